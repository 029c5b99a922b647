# Two commands do everything on a fresh machine with Python 3.11 or 3.12, make and gcc:
#   make demo    the main job on what the machine has
#   make test    all tests that this machine can run
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
# SGLang's newest release that is patched, or RELEASE=0.5.12.post1, in an environment of its own.
RELEASE ?=
EXTRA := sglang$(if $(RELEASE),-$(RELEASE:.post1=))
VENV := .venv$(if $(RELEASE),-$(RELEASE))
BIN := $(VENV)/bin
# Triton builds its launcher with a C compiler and Python.h.
READY := $(VENV)/.ready

# Kept bytecode halves the import of SGLang, which dozens of the tests' processes do; uv compiles none.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test tests test-ports lint docs tables clean

demo: $(READY)
	@$(BIN)/python -m gemma4_turbo demo

# In the order of tests/cpu/conftest.py: xdist's own ends with the files of few tests, the longest of all.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(READY)  ## lint beside the tests: mypy keeps one core alone busy for most of a minute
	@$(MAKE) --no-print-directory -j2 lint tests

tests: $(READY)
	$(PYTEST)

test-ports: $(READY)  ## what depends on SGLang's release most, its ports
	$(PYTEST) tests/cpu/ports tests/cpu/test_stock.py

lint: $(READY) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## the documentation as a site in site/; a broken link is an error
	@# Not --quiet: MkDocs counts no warning that it does not print, and --strict finds none then.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site
	@$(BIN)/towncrier build --draft --version next >/dev/null

tables: $(READY)  ## the tables of README and docs, from bench/results and the catalogue
	$(BIN)/python bench/tables.py

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or 3.12 (PYTHON=/path/to/python3.12)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[$(EXTRA),test,bench,docs]'
	@touch $@

clean:
	rm -rf $(VENV)
