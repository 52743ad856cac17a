# `make test` and `make demo` set up everything they need in .venv, once: on a fresh Linux machine that has
# Python 3.11 or newer, make, a C compiler and git.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup test test-processors test-lowest lint demo docs dist-check bench clean

help:
	@echo "make test    lint, types and tests (sets up .venv first)"
	@echo "make test-processors    the tests with the kernels of other processors, and with two threads"
	@echo "make demo    what the method does, with controls, in under five minutes"
	@echo "make docs    builds the documentation into site/"
	@echo "make dist-check      builds sdist and wheel into dist/, and tries both in other folders"
	@echo "make test-lowest     the tests with the lowest supported version of every dependency (downloads 3 GB)"
	@echo "make bench   the benchmark of the selection"
	@echo "make clean   removes .venv and what was built"

setup: $(READY)

# torch comes first, pinned: anything that asks for "torch" later finds it and pulls no other build.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "the development environment needs Python 3.11 or newer (make PYTHON=python3.12 ...)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The same tests as other processors would see them: other kernels, other orders of summation, two threads. Each has a
# compiler's cache of its own: inductor would take code that was generated for another instruction set from a shared one.
PROCESSORS := MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=2
test-processors: $(READY)
	@for setting in $(PROCESSORS); do \
		echo "== $$setting"; \
		env OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.venv/inductor/$$setting $$setting \
			$(BIN)/python -m pytest -n 2 --dist worksteal || failed="$$failed $$setting"; \
	done; test -z "$$failed" || { echo "failed with$$failed"; exit 1; }

# In an environment of its own: torch from PyPI comes with CUDA's libraries.
LOWEST := .venv-lowest
test-lowest:
	test -d $(LOWEST) || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt \
		--editable '.[all]' array-api-strict hypothesis pytest pytest-timeout pytest-xdist
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal

dist-check: $(READY)
	rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[release]'
	$(BIN)/python tests/check_dist.py dist

demo: $(READY)
	$(BIN)/selective-pref demo

docs: $(READY)
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python tests/benchmarks/bench_selection.py

clean:
	rm -rf .venv .venv-lowest site dist build
