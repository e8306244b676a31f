PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
WORKERS ?= $(if $(filter 1,$(CORES)),1,2)
ARGS ?=

DOCS := $(VENV)/.installed-docs

.PHONY: help quickstart test check format docs docs-site docs-serve clean distclean

help:
	@echo "make quickstart   evaluate the tiny base, align it, evaluate it again, write a report"
	@echo "make test         run the tests (ARGS='-k name' or ARGS='-m slow' to choose)"
	@echo "make check        formatting, lint, types, import order"
	@echo "make format       format the code, and fix what lint can fix"
	@echo "make docs         write the generated pages of docs/reference from the docstrings"
	@echo "make docs-site    build the documentation into build/site; make docs-serve shows it while you edit"
	@echo "make clean        delete caches and build products; make distclean deletes $(VENV) too"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11: install Python 3.11 or say make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no virtual environment: install the venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "Installing into $(VENV) (once; PyTorch is large) ..."
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[dev,peers,math,ocr,eight-bit,ray,diffusers]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/lvrpo quickstart $(ARGS)

# containers often forbid compiled files: every process of the tests would then compile all of lvrpo again
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python docs/make_equations.py
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_keys.py

$(DOCS): $(STAMP)
	$(PIP) -e '.[docs]'
	@touch $@

docs-site: $(DOCS)
	$(BIN)/mkdocs build --strict

docs-serve: $(DOCS)
	$(BIN)/mkdocs serve

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
