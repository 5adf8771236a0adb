# One virtual environment, .venv, serves every target but test-oldest, which has its own; each is made on first use and
# again when setup.cfg or pyproject.toml changes. Another Python: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The oldest Python that is here and that setup.cfg allows, and its oldest releases of everything: each name>=version in
# it, as name==version.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(shell for python in python3.10 "$$(pyenv prefix 3.10 2>&1)/bin/python" $(PYTHON); do \
  "$$python" -c '' 2> /dev/null && echo "$$python" && break; done)
PINNED := 's/^ +([A-Za-z0-9_.-]+)(\[[a-z,]+\])?>=([0-9.]+).*/\1==\3/p'

.DEFAULT_GOAL := help
.PHONY: help .venv .venv-oldest demo test test-all test-oldest check docs coverage benchmarks figures clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## train a small network dense and sparse, and show the difference
	$(BIN)/python -m lightning_sparse.zoo.demo

test: $(INSTALLED)  ## run the tests, but for slow ones, and every example in the documentation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-all: $(INSTALLED)  ## run the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-oldest: $(OLDEST)/.installed  ## run what `make test` runs with the oldest releases that setup.cfg allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow"

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

figures: $(INSTALLED)  ## write docs/measured.md from what the benchmarks have left in benchmarks/results
	$(BIN)/python -m benchmarks.figures

clean:  ## remove what these targets leave behind, but for the virtual environments
	rm -rf build dist demo lightning_logs *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	find lightning_sparse tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(INSTALLED)  ## make the virtual environment

$(INSTALLED): setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): torch and all else are a few GB to download, which takes minutes."
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

.venv-oldest: $(OLDEST)/.installed  ## make the virtual environment of the oldest releases

$(OLDEST)/.installed: setup.cfg pyproject.toml
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	sed -nE $(PINNED) setup.cfg > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --no-compile --constraint $(OLDEST)/constraints.txt --editable ".[dev]"
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
