# Two commands matter on a fresh machine (Python >= 3.10, a C++ compiler, this checkout):
#
#   make demo    train a small language model with torch.nn and with rnnfast, side by side (a few minutes)
#   make test    the whole test suite
#
# Both make .venv, install what they need and build the package first; a second run starts at once.
# Variables: PYTHON (interpreter), VENV, TORCH (pip requirement), TORCH_INDEX (where CPU builds of torch
# live), PYTEST_ARGS, TEST_JOBS, DEMO_ARGS, BENCH_ARGS, and those of the build (RNNFAST_CUDA, CXX, ...).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
VENV_ARGS ?=
TORCH ?= $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements-dev.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
TEST_JOBS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
BUILD_SOURCES := $(wildcard setup.py pyproject.toml CMakeLists.txt CMakePresets.json MANIFEST.in) \
	$(shell find csrc cmake tests/cpp -type f 2>/dev/null)
LINT_CPP = $$(find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# with the development module _core, which tests of the core need
export RNNFAST_DEV ?= 1

# cmake, ninja and clang-format come from the venv, whatever the machine has
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help setup demo test lint format bench clean distclean always

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

# --- environment: a stamp a step, so that a rerun is quick and works without a network -----------------

$(VENV)/.venv:
	@test -n "$(PYTHON)" || { echo "rnnfast: no Python >= 3.10 found; name one with make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV_ARGS) $(VENV) || { rm -rf $(VENV); "$(PYTHON)" -m virtualenv $(VENV_ARGS) $(VENV); } || { \
		echo "rnnfast: $(PYTHON) can't make a virtual environment; install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@touch $@

# The CPU build of torch where no NVIDIA driver is: first from the configured indexes, then from
# PyTorch's own; the plain wheel is the last resort (macOS and arm64 have no other).
$(VENV)/.torch: $(VENV)/.venv
	@echo "installing $(TORCH) into $(VENV)"
	@if $(PY) -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != "$(TORCH)".split("==")[-1])' 2>/dev/null; then \
		true; \
	elif [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		$(PIP) install -qq "$(TORCH)+cpu" 2>/dev/null \
			|| $(PIP) install -qq "$(TORCH)+cpu" --extra-index-url $(TORCH_INDEX) \
			|| $(PIP) install -qq "$(TORCH)"; \
	else \
		$(PIP) install -qq "$(TORCH)"; \
	fi
	@touch $@

# what building and the demo need; versions are bounded by requirements-dev.txt
$(VENV)/.demo: $(VENV)/.torch requirements-dev.txt
	@echo "installing build tools and what the demo needs"
	@$(PIP) install -qq -c requirements-dev.txt setuptools wheel cmake ninja pybind11 numpy matplotlib tqdm
	@touch $@

$(VENV)/.dev: $(VENV)/.demo requirements-dev.txt
	@echo "installing what tests, linters and benchmarks need"
	@$(PIP) install -qq -r requirements-dev.txt
	@touch $@

# compilers and RNNFAST_* variables are read by the build; touch setup.py to build with others
$(VENV)/.built: $(VENV)/.demo $(BUILD_SOURCES) $(if $(wildcard rnnfast/_C*.so),,always)
	@echo "building rnnfast (some minutes on 2 cores; the log is build/install.log)"
	@mkdir -p build
	@$(PIP) install -v --no-build-isolation --no-deps -e . >build/install.log 2>&1 || { cat build/install.log >&2; exit 1; }
	@sed -n 's/^ *-- \(rnnfast: .*\)/\1/p' build/install.log
	@touch $@

setup: $(VENV)/.dev $(VENV)/.built

# --- the jobs --------------------------------------------------------------------------------------

demo: $(VENV)/.built
	$(PY) examples/char_lm.py $(DEMO_ARGS)

test: setup
	$(PY) -m pytest -q -n $(TEST_JOBS) --dist loadfile -m "not alone" $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(PY) -m pytest -q -m alone $(PYTEST_ARGS) || [ $$? -eq 5 ] # 5: none of the chosen tests is

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy rnnfast
	clang-format --dry-run -Werror $(LINT_CPP)

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(LINT_CPP)

bench: setup
	$(PY) -m bench compare $(BENCH_ARGS)

clean:
	rm -rf build build-* dist *.egg-info rnnfast/*.so demo.png $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache
