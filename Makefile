# One virtual environment, .venv, serves every target; it is made on first use and again when setup.cfg or
# pyproject.toml changes. Another Python: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help .venv demo test check docs coverage benchmarks clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## train a small network dense and sparse, and show the difference
	$(BIN)/python -m lightning_sparse.zoo.demo

test: $(INSTALLED)  ## run all tests and every example in the documentation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: $(INSTALLED)  ## format, lint, types, documentation and tests: what a change must pass
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	@$(MAKE) docs
	@$(MAKE) test

docs: $(INSTALLED)  ## build the documentation into build/docs; a warning is an error
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs

coverage: $(INSTALLED)  ## run all tests and list the lines that none of them reaches
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

benchmarks: $(INSTALLED)  ## compare speed with dense training, on this machine
	$(BIN)/python -m benchmarks

clean:  ## remove what these targets leave behind, but for .venv
	rm -rf build dist demo lightning_logs *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	find lightning_sparse tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(INSTALLED)  ## make the virtual environment

$(INSTALLED): setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): torch and all else are a few GB to download, which takes minutes."
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "There is no $(PYTHON) here. Install Python 3.10 or newer, or name yours: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "lightning_sparse needs Python 3.10 or newer, and $(PYTHON) is older." \
	       "Name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: sudo apt install python3-venv." \
	       "Elsewhere, name another Python: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
