"""Examples that stand alone, and ``recipes.benchmarks``, where the project's figures come from."""
