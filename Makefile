# make sample | test | test-all | bench | docs | lint | clean
#
# Each makes the environment $(VENV), installs diffkern and what it needs into it, and runs. VENV=path uses one that
# exists, and keeps its torch. Python, a C++ compiler and make must be there; an nvcc is used if it is (docs/install.md
# has the variables that choose what is built). PYTEST='-k noise' goes to pytest, which runs WORKERS tests at a time.

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

WORKERS  ?= $(shell nproc)
PARALLEL := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

TORCH   := torch==$(shell sed -n 's/^PINNED = "\(.*\)"/\1/p' csrc/setup/build_backend.py)
RUFF    := $(shell sed -n 's/^lint = \["\(.*\)"\]/\1/p' pyproject.toml)
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

# Tests start some hundred processes: each would compile the package anew where bytecode is not kept.
test test-all: export PYTHONDONTWRITEBYTECODE :=

.PHONY: sample test test-all bench docs lint clean

sample: $(VENV)/.diffkern
	$(BIN)/diffkern sample --model fashion-mnist --n 64 --steps 50 --out samples.png

test: $(VENV)/.diffkern-test
	$(BIN)/python tests/interpreted.py
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST)

test-all: $(VENV)/.diffkern-test $(VENV)/.diffkern-interop $(VENV)/.diffkern-tensorboard $(VENV)/.diffkern-docs
	$(BIN)/python tests/interpreted.py
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow" $(PYTEST)

bench: $(VENV)/.diffkern-bench
	$(BIN)/python -m pytest benchmarks --benchmark-only $(PYTEST)

docs: $(VENV)/.diffkern-docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/docs
	@echo build/docs/README.html

lint: $(VENV)/.ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean:
	rm -rf .venv build dist diffkern.egg-info
	rm -f diffkern/_C*.so $(VENV)/.diffkern

# --- the environment: a stamp for each thing installed ---

$(BIN)/python:
	@$(PYTHON) -c "import ensurepip, venv" || { echo "diffkern: expected Python's venv: run apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# First, so that the build takes this one's headers and brings none.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	touch $@

$(VENV)/.diffkern: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --editable .
	touch $@

# diffkern is there: this installs what its extra names, and builds nothing.
$(VENV)/.diffkern-%: $(VENV)/.diffkern
	$(BIN)/pip install "diffkern[$*]"
	touch $@

$(VENV)/.ruff: pyproject.toml | $(BIN)/python
	$(BIN)/pip install "$(RUFF)"
	touch $@
