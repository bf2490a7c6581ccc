# Every target sets itself up: a virtual environment in .venv, pinned packages, the native build.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt pyproject.toml constraints.txt
MODULES := $(shell find pycircuit kernels -name '*.py' | sort)

.PHONY: demo test lint bench gpu sanitize build clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Build tools first: the package itself builds without isolation, against the pinned versions. torch is pinned
# before anything could ask for another one.
.venv/.tools: $(BIN)/python constraints.txt
	$(PIP) scikit-build-core pybind11 cmake ninja
	$(PIP) torch
	@touch $@

# An editable install maps the modules it finds: a new one asks for a new install.
.venv/.modules: FORCE | $(BIN)/python
	@echo $(MODULES) | cmp -s - $@ || echo $(MODULES) > $@
.PHONY: FORCE

.venv/.build: .venv/.tools .venv/.modules $(SOURCES)
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

.venv/.lint: .venv/.tools
	$(PIP) ruff mypy clang-format pre-commit
	@touch $@

build: .venv/.build

demo: build
	$(BIN)/pycircuit demo

test: build
	$(BIN)/pytest -q

# The last line builds the core with -Wall -Wextra -Werror.
lint: build .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh .ci/native build-werror -DPYCIRCUIT_WERROR=ON

# Threads stay on their cores: a thread that moves loses its cache in the middle of a sample.
bench: build
	OMP_PROC_BIND=true $(BIN)/pytest benchmarks/test_ops.py -q --benchmark-enable --benchmark-disable-gc \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# The native op tests against a core that checks every access. Torch's own leaks are not ours to fail on.
sanitize: build
	PATH="$(CURDIR)/$(BIN):$$PATH" sh .ci/sanitize

# On a machine with a GPU, with its own Python and no network: make gpu [RESULTS=dir] [SECTION=name]
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(RESULTS),--results $(RESULTS)) $(if $(SECTION),--section $(SECTION))

clean:
	rm -rf .venv .venv-gpu build build-* dist
