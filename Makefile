# Everything a checkout needs, from a machine with Python >= 3.11 and make:
#
#   make verify    create .venv, install, and compare the gradients with PyTorch's
#   make test      install and run every test
#   make lint      format, lint and type checks
#   make clean     remove .venv and caches
#
# PYTHON is the interpreter that creates .venv.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
SOURCES = mlp_backprop tests

.PHONY: verify test lint clean

verify: .venv/installed-verify
	.venv/bin/python -m mlp_backprop verify

test: .venv/installed-test
	.venv/bin/python -m pytest

lint: .venv/installed-lint
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed-verify: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing mlp-backprop with torch and the command line into .venv ..."
	$(PIP) --constraint constraints.txt --editable '.[cli,torch]'
	touch $@

.venv/installed-test: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing mlp-backprop with everything the tests compare with into .venv ..."
	$(PIP) --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/installed-lint: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing ruff and mypy into .venv ..."
	$(PIP) --constraint constraints.txt --editable '.[lint]'
	touch $@
