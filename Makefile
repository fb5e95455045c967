# make serve              set everything up and serve the demo model on http://127.0.0.1:8000
# make serve ARGS="MODEL --port 9000"   (any arguments of `mixserve serve`)
# make test               the whole suite, demo model included      (about 25 minutes on 2 cores)
# make test-unit          without the demo model and real servers
# make test-full          also the slow tests
# make check | format     ruff and mypy | let ruff rewrite
# make clean              remove .venv and all that tools left behind

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
NODE := tests/e2e/node

.PHONY: help serve test test-unit test-full check format clean
help:
	@sed -n '/^# /!q; s/^# //p' Makefile

serve: $(VENV)/run.stamp
	@$(BIN)/mixserve serve $(ARGS)

test: $(VENV)/dev.stamp $(VENV)/triton.stamp $(NODE)/node_modules/.package-lock.json
	@$(PYTEST) -m "not slow" $(ARGS)

test-unit: $(VENV)/dev.stamp $(VENV)/triton.stamp
	@$(PYTEST) -m "not slow and not demo" --ignore tests/e2e $(ARGS)

test-full: $(VENV)/dev.stamp $(VENV)/triton.stamp $(NODE)/node_modules/.package-lock.json
	@$(PYTEST) $(ARGS)

check: $(VENV)/dev.stamp
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/dev.stamp
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	@rm -rf $(VENV) $(NODE)/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find server engine weights tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp is newer than what it was installed from. setuptools comes first, pinned, so that building the project fetches none.
$(VENV)/run.stamp: pyproject.toml constraints.txt setup.py $(wildcard engine/kernels/cpu/*.cpp engine/kernels/cpu/*.h)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mixserve needs Python 3.11 or later: make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing mixserve into $(VENV) (PyTorch is large: this can take minutes) ..."
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "Installing what the tests and checks need ..."
	@$(INSTALL) --no-build-isolation --editable '.[test,lint]'
	@touch $@

# OpenAI's Node client, and axe-core for the tests in a browser, where there is npm. Those tests are left out without, and
# pytest says so at its end.
$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json
	@! command -v npm > /dev/null || npm ci --prefix $(NODE) --no-audit --no-fund --silent || true

# An older Triton for the compile gates of the GPU kernels. They are left out without it, and pytest says so at its end.
$(VENV)/triton.stamp: $(VENV)/dev.stamp tests/engine/kernels/older.py
	@$(BIN)/python -m tests.engine.kernels.older && touch $@ || true
