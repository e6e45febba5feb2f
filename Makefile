# Each target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
OUT ?= runs/notebooks
# Python compiles a package when it is first imported, most of them never, and keeps it for the many processes that a
# target starts, also where the environment forbids that.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs notebooks dist versions clean

help:
	@echo "make demo   train DFBST and a dense baseline on scikit-learn's digits, and compare (ARGS='--epochs 1' passes options)"
	@echo "make test   run the tests and the examples in docstrings (JOBS=$(JOBS) at a time)"
	@echo "make lint   ruff and mypy"
	@echo "make docs   build the documentation into site/; warnings are errors"
	@echo "make notebooks  run the notebooks, and write them to $(OUT) (OUT=notebooks renews what they show)"
	@echo "make dist   build sdist and wheel into dist/, and check them as a package index does"
	@echo "make versions  run the fast part of the tests with the oldest and the newest torch and Lightning (long downloads)"
	@echo "make clean  remove the virtual environment, caches, site and runs/demo-*"

# Set up once, and again when pyproject.toml changes.
$(VENV)/installed: pyproject.toml
	@test -x $(BIN)/python || { echo "Creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing lightning-sparse and what it needs into $(VENV) (some minutes the first time)"
	$(BIN)/python -m pip install --no-compile --progress-bar off --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/lightning-sparse demo $(ARGS)

# File by file, so that what a fixture trains for the tests of a file is trained once.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --doctest-modules lightning_sparse tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f .mkdocs.yml

# Without times and names of kernels, which would be a difference at every run.
notebooks: $(VENV)/installed
	printf '%s\n' notebooks/*.ipynb | OMP_NUM_THREADS=1 xargs -n 2 -P $(JOBS) $(BIN)/jupyter-nbconvert --execute \
		--to notebook --output-dir $(OUT) --NbConvertApp.use_output_suffix=False --log-level WARN \
		--ExecutePreprocessor.record_timing=False --ClearMetadataPreprocessor.enabled=True

dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

versions: $(VENV)/installed
	$(BIN)/nox -s oldest newest

clean:
	rm -rf $(VENV) site dist .nox .pytest_cache .mypy_cache .ruff_cache runs/demo-*
