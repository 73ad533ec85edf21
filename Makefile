# Everything a checkout needs, from a machine with Python >= 3.11 and make:
#
#   make verify    create .venv, install, and compare the gradients with PyTorch's
#   make test      install and run every test, on all cores and in a random order
#   make lint      format, lint and type checks
#   make bench     the benchmarks, under fifteen minutes; bench-quick, bench-full
#   make bench-load     how much slower each call gets beside a busy process; ten minutes
#   make bench-training whole training runs beside torch, JAX and scikit-learn; under ten minutes
#   make test-kernels   every CUDA kernel in every configuration, compiled and run on the CPU
#   make check-gpu      is the CUDA engine right on this card, and how fast; under ten minutes
#   make bench-gpu      the benchmarks of a CUDA card, under eight minutes
#   make clean     remove .venv and caches
#
# PYTHON is the interpreter that creates .venv, and the one that check-gpu and bench-gpu run on:
# these two install nothing.

PYTHON ?= python3
# Python compiles what is imported when it is imported: pip would compile all, for half a minute.
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
SOURCES = mlp_backprop tests benchmarks

.PHONY: verify test test-kernels lint bench bench-quick bench-full bench-load bench-training check-gpu bench-gpu clean

verify: .venv/installed-verify
	.venv/bin/python -m mlp_backprop verify

# One worker for each core, each of up to three gigabytes; more than eight would gain nothing.
PYTEST = .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: .venv/installed-test
	$(PYTEST)

test-kernels: .venv/installed-kernels
	$(PYTEST) -m kernels

bench-quick bench bench-full: .venv/installed-test
	mkdir -p build
	.venv/bin/python -m mlp_backprop bench --json build/$@.json \
		--selection $(or $(patsubst bench-%,%,$(filter-out bench,$@)),default)

bench-load: .venv/installed-test
	mkdir -p build
	.venv/bin/python benchmarks/bench_load.py --json build/$@.json

bench-training: .venv/installed-test
	mkdir -p build
	.venv/bin/python benchmarks/bench_training.py --json build/$@.json

# Machines with a card are often offline, and have a torch of their own: all stays as it is.
check-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/check_gpu.py --json build/$@.json

bench-gpu:
	mkdir -p build
	PYTHONPATH=. $(PYTHON) benchmarks/bench_gpu.py --json build/$@.json

lint: .venv/installed-lint
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/mypy
	.venv/bin/mypy tests/typed_calls.py

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed-verify: EXTRAS = cli,torch
.venv/installed-test: EXTRAS = test
.venv/installed-lint: EXTRAS = lint
# A few hundred megabytes, for a header of cuBLAS and the library that goes with it.
.venv/installed-kernels: EXTRAS = kernels
.venv/installed-kernels: .venv/installed-test

.venv/installed-%: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing mlp-backprop[$(EXTRAS)] into .venv ..."
	$(PIP) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
