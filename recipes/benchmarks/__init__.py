"""The scripts behind every figure of the project's pages, by purpose, and their results.

Each is a module that is run from the root of the repository, which is where ``recipes`` and
``tests`` can be imported from (neither is installed):

    python -m recipes.benchmarks.speed.tracing
    python -m recipes.benchmarks.comparison.peers --help

What scripts share they import from one another by those names. ``comparison`` trains and compares,
``speed`` times, ``correctness`` measures how exact things are, ``pages`` writes the figures into
the pages. Results lie in ``results/``, those that only the log of what was tried reads in
``results/log/``. A file is named by what it holds, and measuring anew replaces it; facts of the
machine are inside.
"""
