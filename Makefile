# make and Python >= 3.10 are all that is needed; everything else is installed into .venv.
#   make demo         train adapters, carry them to sibling models, show what arrives
#   make test         all checks (what .ci/run calls)
#   make test-oldest  the tests with the oldest versions that pyproject.toml allows
#   make format lint  while writing
# PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
CLEAN := build/clean

.PHONY: venv demo test test-oldest format lint unit smoke short-demo clean
.DELETE_ON_ERROR:

venv: .venv/ready-to-test

# $(call install,folder,constraints,extras,stamp): the stamp makes this run again when what is asked for has changed.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "xadapt needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade --constraint $(2) pip
	@echo "Installing into $(1); on the first run this takes minutes, most of them for torch."
	$(1)/bin/python -m pip install --constraint $(2) --editable '.[$(3)]'
	@touch $(4)
endef

# What the demo needs. torchao is left to the tests: with it, `import peft` is slow and talks.
.venv/ready-to-run: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,bench,$@)

.venv/ready-to-test: .venv/ready-to-run
	$(call install,.venv,constraints.txt,test,$@)

.venv-oldest/ready-to-test: pyproject.toml constraints-oldest.txt
	$(call install,.venv-oldest,constraints-oldest.txt,test,$@)

demo: .venv/ready-to-run
	$(BIN)/python -m benchmarks.tiny demo

test: lint unit smoke short-demo

lint: venv
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# Two processes; the tests of one file stay in one of them, and the files in their order. Not in pyproject.toml, so that a
# single test run by hand starts at once and can be debugged.
PYTEST := -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder

unit: venv
	$(BIN)/python $(PYTEST)

# The wheel, alone in a venv of its own. Only the heavy dependencies are .venv's: a path file adds its folder, but not what
# path files there add, so the checkout is out of sight.
smoke: venv
	rm -rf build/wheel $(CLEAN)
	$(BIN)/python -m build --wheel --outdir build/wheel .
	$(BIN)/python -m venv $(CLEAN)
	$(CLEAN)/bin/python -m pip install --quiet --no-deps --no-index build/wheel/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(CLEAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/heavy.pth"
	cd build && clean/bin/xadapt methods
	$(CLEAN)/bin/python -I tests/wheel_smoke.py

short-demo: venv
	$(BIN)/python -m benchmarks.tiny demo --short --fresh --out build/short-demo

test-oldest: .venv-oldest/ready-to-test
	$(OLDEST)/python $(PYTEST)

format: venv
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv .venv-oldest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
