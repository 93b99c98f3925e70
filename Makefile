# Every target makes its own environment from nothing but Python 3.11 or newer: `make test PYTHON=python3.12`.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2] if sys.version_info >= (3, 11) else "")' 2>/dev/null)
ifeq ($(filter clean test-all,$(MAKECMDGOALS)),)
ifeq ($(VERSION),)
$(error NeuroNet-JAX needs Python 3.11 or newer, and $(PYTHON) is not: $(shell $(PYTHON) --version 2>&1 | head -1). Name another one: make $(MAKECMDGOALS) PYTHON=python3.11)
endif
endif

VENV := .venv-$(VERSION)
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.DEFAULT_GOAL := test
.PHONY: env demo test test-all codes soak slurm-test lint format docs clean

env: $(STAMP)

# the stamp comes last: an interrupted installation starts again
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m experiments.demo

# Both versions where both are installed; `-c ""` because a version manager's stand-in exists but does not run
test-all:
	@for version in 3.11 3.12; do \
	  if python$$version -c "" >/dev/null 2>&1; then $(MAKE) test PYTHON=python$$version || exit 1; \
	  else echo "python$$version is not installed here: its tests are left out."; fi; \
	done

# the documentation's table of codes, from neuronet_jax/codes.py
codes: $(STAMP)
	$(BIN)/python -c 'from neuronet_jax.codes import page; print(page(), end="")' > docs/codes.md

# Files of tests side by side, at most four: each process has eight devices, and compiles its own programs. In their own
# order: the files with the fewest tests, which xdist would put last, take the longest. Most of the time is compilation,
# which takes two thirds of it without the compiler's optimisations; `make soak` has them.
test: lint
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=true $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

soak: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m soak --timeout=3600 $(PYTEST_ARGS)

slurm-test: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slurm tests/experiments/launch $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck experiments/launch/*.sh
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The pages need no network. They open as files; searching in them takes a server: python -m http.server --directory build/site
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The pages are in build/site/index.html"

clean:
	rm -rf .venv-* .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
