# Every target sets itself up: a virtual environment in .venv, pinned packages, the native build.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test lint bench gpu build clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Build tools first: the package itself builds without isolation, against the pinned versions.
.venv/.tools: $(BIN)/python constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	@touch $@

.venv/.build: .venv/.tools $(SOURCES)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[test]'
	@touch $@

build: .venv/.build

test: build
	$(BIN)/pytest -q

# On a machine with a GPU, with its own Python and no network: make gpu [RESULTS=dir] [SECTION=name]
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(RESULTS),--results $(RESULTS)) $(if $(SECTION),--section $(SECTION))

clean:
	rm -rf .venv build dist
