# make demo | make test | make check: each installs what it needs into .venv first
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs browser clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("whet needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

.venv/.test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo,test,openvino,ray]'
	touch $@ .venv/.demo

.venv/.check: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo,test,openvino,ray,check,docs]'
	touch $@ .venv/.test .venv/.demo

demo: .venv/.demo
	$(BIN)/whet demo --output out/ --force

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/.check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

# Chromium for the tests of the page, which are skipped without it
browser: .venv/.browser

.venv/.browser: $(BIN)/python
	npm install --silent --no-audit --no-fund --prefix .venv/browser puppeteer-core@24 @sparticuz/chromium@147
	touch $@

docs: .venv/.check
	$(BIN)/mkdocs serve

clean:
	rm -rf .venv out site
