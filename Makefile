# `make help` lists the targets. All that they install or build stays in .venv and build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CMAKE := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)

# Without a GPU, compiling for one would only cost time.
GPU := $(or $(wildcard /dev/nvidia0),$(shell nvidia-smi -L 2>/dev/null))
JAX_EP_CUDA ?= $(if $(GPU),on,off)
export JAX_EP_CUDA
comma := ,
CUDA_EXTRA := $(if $(filter on ON On 1 true yes,$(JAX_EP_CUDA)),$(comma)cuda13)

NATIVE_SOURCES := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find ffi -type f)
FORMATTED_SOURCES = $(shell find ffi tests -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) JAX_EP_CUDA=$(JAX_EP_CUDA) DEMO_ARGS= PYTEST_ARGS= BENCH_ARGS="

.PHONY: demo
demo: $(VENV)/.installed-examples  ## Set up .venv and train a small MoE language model
	$(BIN)/python examples/train_moe_lm.py $(DEMO_ARGS)

.PHONY: test
test: $(VENV)/.installed-test  ## Set up .venv and run the tests
	$(BIN)/pytest $(PYTEST_ARGS)

.PHONY: bench
bench: $(VENV)/.installed-examples  ## Measure, beside stock JAX on the same machine
	$(BIN)/python -m jax_ep.bench $(BENCH_ARGS)

.PHONY: lint
lint: $(VENV)/.installed-dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED_SOURCES)

.PHONY: format
format: $(VENV)/.installed-dev  ## Apply the style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED_SOURCES)

.PHONY: sanitize sanitize-asan sanitize-tsan
sanitize: sanitize-asan sanitize-tsan  ## Test the CPU ops in C++ under AddressSanitizer and ThreadSanitizer
sanitize-asan: SANITIZER := address,undefined
sanitize-tsan: SANITIZER := thread

# ThreadSanitizer may find no room for its shadow memory where the kernel randomises addresses.
sanitize-asan sanitize-tsan: sanitize-%: $(VENV)/.installed-tools
	$(CMAKE) -S . -B build/$* -DJAX_EP_SANITIZE=$(SANITIZER)
	$(BIN)/cmake --build build/$* --target cpu_ops_test
	timeout 600 $$(setarch -R true 2>/dev/null && echo setarch -R) build/$*/cpu_ops_test

.PHONY: cuda
cuda: $(VENV)/.installed-tools  ## Compile the CUDA code, without running it
	$(CMAKE) -S . -B build/cuda -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DJAX_EP_CUDA=ON -DJAX_EP_CUDA_ARCHITECTURES=90
	$(BIN)/cmake --build build/cuda --target _cuda

.PHONY: clean
clean:  ## Remove all that the other targets made
	rm -rf $(VENV) build dist out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jax_ep needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version): choose one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	  { echo "jax_ep needs Python.h: install the headers of $(PYTHON) (Debian, Ubuntu: python3-dev)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable, since the tests run beside the sources, whose folder would hide an installed package. Each set
# of requirements holds the ones before it.
install = $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(1)$(CUDA_EXTRA)]'

$(VENV)/.installed-examples: $(VENV)/pyvenv.cfg $(NATIVE_SOURCES)
	@echo "Installing jax_ep (JAX_EP_CUDA=$(JAX_EP_CUDA)) and what the example needs into $(VENV): minutes at first"
	$(call install,examples)
	@touch $@

$(VENV)/.installed-test: $(VENV)/pyvenv.cfg $(NATIVE_SOURCES)
	@echo "Installing jax_ep (JAX_EP_CUDA=$(JAX_EP_CUDA)) and what the tests need into $(VENV): minutes at first"
	$(call install,test)
	@touch $(VENV)/.installed-examples $@

$(VENV)/.installed-dev: $(VENV)/pyvenv.cfg $(NATIVE_SOURCES)
	$(call install,dev)
	@touch $(VENV)/.installed-examples $(VENV)/.installed-test $@

# Compiles without the package's own build: no editable install is needed.
$(VENV)/.installed-tools: $(VENV)/pyvenv.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'cmake>=3.24' ninja 'nanobind>=2.7' 'jax>=0.10.2'
	@touch $@
