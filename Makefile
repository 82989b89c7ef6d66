# `make train` and `make test` work on a fresh clone: each makes what it needs first.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ARGS   ?=

# `make train model.latent_dim=8` works: what is no variable of this file is a setting.
SETTINGS = $(filter-out PYTHON=% VENV=% ARGS=% RUN=% MATRIX=%,$(MAKEOVERRIDES)) $(ARGS)
# The run to look at: the newest finished one, or RUN=DIR.
RUN = $(patsubst %/summary.json,%,$(firstword $(shell ls -t outputs/*/summary.json outputs/*/*/summary.json 2>/dev/null)))

.PHONY: help install train evaluate explore test test-all test-matrix lint format docs docs-serve clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY) ## the environment in .venv/, with everything the tests need

# pip once, again only when pyproject.toml changes.
$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name yours with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

train: $(READY)  ## one run: make train train.epochs=2
	$(BIN)/python scripts/train.py $(SETTINGS)

evaluate: $(READY) ## the evaluation card of the newest run; RUN=DIR: another one
	@test -n "$(RUN)" || { echo "no finished run under outputs/: make train, or name one with RUN=DIR" >&2; exit 2; }
	$(BIN)/python scripts/evaluate.py $(RUN) $(SETTINGS)

explore: $(READY) ## a page to walk through the newest run's latent space; RUN=DIR: another one
	@test -n "$(RUN)" || { echo "no finished run under outputs/: make train, or name one with RUN=DIR" >&2; exit 2; }
	$(BIN)/python scripts/explore.py $(RUN) --open $(SETTINGS)

test: $(READY)   ## the test-suite
	$(BIN)/python -m pytest -q -n auto $(ARGS)

test-all: $(READY) ## everything, the long campaigns included
	$(BIN)/python -m pytest -q -n auto -m "slow or not slow" $(ARGS)

# Needs uv and the network. MATRIX="3.13-lowest" runs one of them.
MATRIX ?= $(foreach python,3.11 3.12 3.13,$(python)-lowest $(python)-newest)
test-matrix:     ## the suite for Python 3.11 to 3.13, with the lowest and the newest dependencies
	@command -v uv >/dev/null || { echo "uv not found: pip install uv" >&2; exit 2; }
	@failed=; for each in $(MATRIX); do \
	  python=$${each%-*}; case $$each in *-lowest) how=lowest-direct;; *) how=highest;; esac; \
	  here=.matrix/$$each; echo "== Python $$python, $${each#*-} dependencies"; \
	  uv venv --quiet --clear --seed --python $$python $$here && \
	  uv pip install --quiet --python $$here/bin/python --resolution $$how --editable ".[dev]" && \
	  $$here/bin/python -m pytest -q -n auto $(ARGS) || failed="$$failed $$each"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

lint: $(READY)   ## ruff (lint and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# MkDocs tells of its successor, which is not used here.
docs: $(READY)   ## the documentation, into site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(READY) ## the documentation at http://localhost:8000, built anew as you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

clean:           ## remove the environment and caches, keep data/ and outputs/
	rm -rf $(VENV) .matrix build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
