# Everything runs in .venv, which the first target that needs it makes. Only python3 (3.11 or newer), make and git
# have to be there. Another Python: make PYTHON=python3.12 test. Another virtual environment: make VENV=/tmp/venv test.
# Options for pip (another torch build, say): make PIP_OPTIONS="..." demo, or pip's own environment variables.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
PIP_OPTIONS ?=

# Absolute, so that the commands work whatever directory a recipe changes to.
BIN := $(abspath $(VENV))/bin
# The constraints hold the versions the tests were run with. The package itself asks for lower bounds only.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint requirements/constraints.txt $(PIP_OPTIONS)
# Installed again only after one of these changed.
INPUTS := pyproject.toml requirements/constraints.txt src/posteriori/_version.py
# pdoc follows __all__, which names few modules (those filtered out here); the others are named one by one.
MODULES = $(filter-out posteriori.adapters posteriori.operators posteriori.pivot posteriori.priors posteriori.sample, $(subst /,.,\
  $(patsubst src/%.py,%,$(wildcard src/posteriori/[a-z]*.py)) \
  $(patsubst src/%/__init__.py,%,$(wildcard src/posteriori/*/__init__.py))))

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test test-fast lint format docs build clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo        restore the bundled photos in five tasks; the contact sheet goes to $(OUT)"
	@echo "make test        ruff, mypy and every test"
	@echo "make test-fast   the tests that are not marked slow"
	@echo "make lint        ruff and mypy alone"
	@echo "make format      let ruff format and fix what it can"
	@echo "make docs        API reference as web pages, in out/docs"
	@echo "make build       the wheel and the source archive, in dist"
	@echo "make install     the package with its core dependencies, in $(VENV) (install-dev: with the developers' tools)"
	@echo "make clean       remove caches and outputs (distclean: and $(VENV))"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "posteriori needs Python 3.11 or newer, $(PYTHON) is older or missing: try make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) -m venv failed: some systems keep it in a package of its own (python3-venv)" >&2; exit 2; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(INPUTS)
	@echo "installing posteriori into $(VENV) (a few minutes the first time)"
	@$(PIP) --editable .
	@touch $@

# Waits for the plain install rather than repeating it, so that `make -j demo test` never runs two pips at once.
$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the developers' tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	@$(PIP) --editable '.[docs]'
	@touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	@$(BIN)/posteriori demo -o '$(OUT)'
	@for sheet in '$(abspath $(OUT))'/*.png; do \
	  [ -e "$$sheet" ] || { echo "posteriori demo wrote no contact sheet to $(OUT)" >&2; exit 1; }; \
	  echo "contact sheet: $$sheet"; \
	done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m 'not slow'

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-docs
	$(BIN)/pdoc --docformat google --output-directory out/docs posteriori $(MODULES)
	@echo "API reference: $(abspath out/docs)/index.html"

build: $(VENV)/.installed-dev
	$(BIN)/python -m hatchling build -d dist

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf '$(VENV)'
