# `make demo` and `make test` do everything on a fresh machine: virtual environment, pinned install, run.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two workers with one thread each beat one worker with two threads on small models; more threads would only contend.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
FRAMEWORKS := flower nvflare
.PHONY: help venv $(FRAMEWORKS:%=env-%) demo test test-slow check format bench docs wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

venv: $(STAMP) ## create the virtual environment with pinned dependencies (once)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON); install Python 3.11, or name another with 'make PYTHON=python3.12'." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

env-flower: .venv-flower/.installed ## an environment of its own with Flower and its simulation

env-nvflare: .venv-nvflare/.installed ## an environment of its own with NVFlare

# Frameworks bring hundreds of megabytes and pins of their own, so that each has an environment, on top of the main one.
.venv-%/.installed: $(STAMP)
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	echo "import site; site.addsitedir('$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> .venv-$*/lib/$$(ls .venv-$*/lib)/site-packages/main.pth
	.venv-$*/bin/python -m pip install -q -c constraints.txt -e '.[$*]'
	touch $@

demo: $(STAMP) ## leak a real photograph from one gradient, of a LeNet and of a vision transformer
	$(BIN)/gradleak demo

test: $(STAMP) ## fast tests (under three minutes on two cores)
	$(PYTEST) -n $(WORKERS) --dist loadgroup

test-slow: $(STAMP) ## the tests that take longer, which CI runs too
	$(PYTEST) -n $(WORKERS) --dist loadgroup -m 'slow and not gpu and not network'

check: $(STAMP) ## lint, formatting, strict types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure every target and store it in benchmarks/results/
	$(BIN)/python benchmarks/run.py

docs: $(STAMP) ## build docs/ as a site in site/
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(STAMP) ## build sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build

clean: ## remove everything that make made
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis gradleak-demo
