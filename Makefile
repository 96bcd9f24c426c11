# `make demo` and `make test` set themselves up on a machine with Python 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: demo test check docs setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train the small policy with GRPO and show the result"
	@echo "make test    lint, format, types and the test suite"
	@echo "make check   lint, format and types only"
	@echo "make docs    the site, into site/"
	@echo "make clean   remove the virtual environment"

# Installs again only when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# What builds the site is installed by `make docs` alone.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/polopt train grpo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

docs: $(DOCS_STAMP)
	$(BIN)/python -m scripts.docs

clean:
	rm -rf $(VENV)
