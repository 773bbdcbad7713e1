# `make demo` and `make test` do everything on a fresh machine that has Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test check lint types suite clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graft needs Python 3.11 or newer, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	# by all cores, as pip does not; files that are no Python for this version are left as they are
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

demo: $(VENV)/.installed
	$(BIN)/graft run recipes/quickstart.yaml

check: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

suite: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: lint
	$(MAKE) --no-print-directory --jobs 2 types suite

clean:
	rm -rf $(VENV) build runs
