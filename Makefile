# Every check, from a bare checkout: needs python3.11 or newer with venv, no more.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Paths that ruff reads; the ones that are not there are left out.
SOURCES := $(wildcard setup.py prompt_jax tasks gin_configs scripts tests benchmarks docs)

# Quiet TensorFlow, which seqio imports.
export TF_CPP_MIN_LOG_LEVEL ?= 2

# Where the study goes; it goes on there, too.
STUDY_DIR ?= out/pocket

.PHONY: help install test slow lint format study bench clean

help:  ## Lists the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

install: $(STAMP)  ## Makes .venv and installs the package and its tools.

test: lint  ## Lint, types and all tests but the slow ones.
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

slow: $(STAMP)  ## The slow tests.
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow $(ARGS)

lint: $(STAMP)  ## ruff and pyright.
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## Formats, and mends what ruff can mend.
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

$(VENV)/.study: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[report]'
	touch $@

study: $(VENV)/.study  ## The pocket study: accuracy against model size.
	$(BIN)/prompt-jax study studies/pocket.gin --model_dir=$(STUDY_DIR)

bench: $(STAMP)  ## The benchmarks, one after the other.
	set -e; for file in benchmarks/*.py; do $(BIN)/python $$file; done

clean:  ## Removes what the other targets made.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
