# `make demo` and `make test` each work on a machine with nothing but Python (>= 3.10): both set up .venv first.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
TESTS  ?= tests
CONSTRAINTS ?= constraints.txt

FETCH       := $(PY) tests/conformance/fetch_transformers_tests.py
CONFORMANCE := $(PY) -m pytest -c tests/conformance/pytest.ini tests/conformance

MKDOCS      := NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs

.DEFAULT_GOAL := help
.PHONY: help demo test coverage slow bench conformance docs docs-serve lint format typecheck wheel clean

demo test coverage slow conformance: export OMP_NUM_THREADS ?= 1

help:  ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python >= 3.10 is needed, but '$(PYTHON)' is not: choose one with  make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## segment an image with the checkpoint of this repository, into demo/
	$(PY) examples/demo.py

test: $(STAMP)  ## the tests, then transformers' own tests on our classes
	$(PY) -m pytest -n 2 -m "not slow" $(MEASURE) $(TESTS)
	@if $(FETCH); then $(CONFORMANCE); else echo "conformance SKIPPED: no tests of transformers, see above"; fi

coverage: MEASURE = --cov --cov-report=term-missing:skip-covered
coverage: test  ## make test, with the lines of src/ that no test reaches; fails below 90 %

slow: $(STAMP)  ## the tests that take minutes
	$(PY) -m pytest -m slow $(TESTS)

bench: $(STAMP)  ## every stage beside transformers' MaskFormer: a table, benchmarks/results.json (on a GPU results_gpu.json) and .png
	$(PY) benchmarks/speed.py $(if $(BUSY),--busy $(BUSY))

conformance: $(STAMP)  ## transformers' own tests on our classes, beside transformers' MaskFormer
	$(FETCH)
	$(CONFORMANCE)

docs: $(STAMP)  ## the documentation as a site, into build/site; a warning is an error
	$(MKDOCS) build --strict

docs-serve: $(STAMP)  ## the same at http://127.0.0.1:8000, made anew when a page changes
	$(MKDOCS) serve

lint: $(STAMP)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)  ## ruff, rewriting the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: $(STAMP)  ## mypy
	$(PY) -m mypy

wheel: $(STAMP)  ## a wheel and a source distribution, into dist/
	rm -rf build/lib build/bdist.* dist
	$(PY) -m build

clean:  ## remove .venv, caches and outputs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage build dist demo src/*.egg-info
