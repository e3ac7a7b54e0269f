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

NATIVE_SOURCES := pyproject.toml jax_ep/_version.py CMakeLists.txt $(wildcard cmake/*) $(shell find ffi -type f)
FORMATTED_SOURCES = $(shell find ffi tests -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')

# Random shapes for each number of ranks.
EMULATED_SHAPES ?= 3

# Tests in parallel. On GPUs they follow one another: each takes all of them.
TEST_PROCESSES ?= $(if $(GPU),0,2)

# What is installed in .venv, by set of requirements.
EXAMPLES := $(VENV)/.examples-cuda-$(JAX_EP_CUDA)
TEST := $(VENV)/.test-cuda-$(JAX_EP_CUDA)
DEV := $(VENV)/.dev-cuda-$(JAX_EP_CUDA)
TOOLS := $(VENV)/.tools
DOCS := $(VENV)/.docs
PYPI_NVCC := $(VENV)/.nvcc

NVCC := $(or $(CUDACXX),$(shell command -v nvcc),$(wildcard $(or $(CUDA_HOME),$(CUDA_PATH),/usr/local/cuda)/bin/nvcc))
# What pyproject.toml lists under a key.
requirements = $$($(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*p$(1))')
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) JAX_EP_CUDA=$(JAX_EP_CUDA) TEST_PROCESSES=$(TEST_PROCESSES)" \
	  "PYTEST_ARGS= DEMO_ARGS= OLMOE_ARGS= DECODE_ARGS= BENCH_ARGS="

.PHONY: demo
demo: $(EXAMPLES)  ## Set up .venv and train a small MoE language model
	$(BIN)/python examples/train_moe_lm.py $(DEMO_ARGS)

.PHONY: olmoe
olmoe: $(EXAMPLES)  ## Set up .venv and train a small OLMoE, with checkpoints
	$(BIN)/python examples/olmoe.py $(OLMOE_ARGS)

.PHONY: decode
decode: $(EXAMPLES)  ## Set up .venv and write text with the model of train_moe_lm.py, in low-latency mode
	$(BIN)/python examples/decode.py $(DECODE_ARGS)

.PHONY: test
test: $(TEST)  ## Set up .venv and run the tests
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

.PHONY: bench
bench: $(EXAMPLES)  ## Measure, beside stock JAX on the same machine
	$(BIN)/python -m jax_ep.bench $(BENCH_ARGS)

.PHONY: docs
docs: $(DOCS)  ## Build the documentation in build/docs; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Its environment has the wheel and what that depends on, and lies outside this tree.
.PHONY: wheel
wheel: $(VENV)/pyvenv.cfg  ## Build a source distribution and from it a wheel, in dist, and try that
	$(PIP) install 'build>=1.2'
	rm -rf dist
	$(BIN)/python -m build
	environment=$$(mktemp -d) && trap 'rm -rf "$$environment"' EXIT && \
	  $(BIN)/python -m venv "$$environment" && \
	  "$$environment/bin/python" -m pip --quiet --disable-pip-version-check install dist/*.whl && \
	  "$$environment/bin/python" -I -W error tests/smoke.py && \
	  "$$environment/bin/python" -m pip --quiet --disable-pip-version-check install --dry-run "$$(echo dist/*.whl)[dev]"

.PHONY: lint
lint: $(DEV)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED_SOURCES)

.PHONY: format
format: $(DEV)  ## Apply the style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED_SOURCES)

.PHONY: sanitize sanitize-asan sanitize-tsan
sanitize: sanitize-asan sanitize-tsan  ## Test the CPU ops in C++ under AddressSanitizer and ThreadSanitizer
sanitize-asan: SANITIZER := address,undefined
sanitize-tsan: SANITIZER := thread

# ThreadSanitizer may find no room for its shadow memory where the kernel randomises addresses.
sanitize-asan sanitize-tsan: sanitize-%: $(TOOLS)
	$(CMAKE) -S . -B build/$* -DJAX_EP_SANITIZE=$(SANITIZER)
	$(BIN)/cmake --build build/$* --target cpu_ops_test
	timeout 600 $$(setarch -R true 2>/dev/null && echo setarch -R) build/$*/cpu_ops_test

.PHONY: emulate
emulate: $(TOOLS)  ## Test the CUDA kernels' logic on the CPU (x86-64), under UndefinedBehaviorSanitizer
	$(CMAKE) -S . -B build/emulator -DJAX_EP_SANITIZE=undefined
	$(BIN)/cmake --build build/emulator --target cuda_ops_emulated_test
	timeout 300 build/emulator/cuda_ops_emulated_test $(EMULATED_SHAPES)

.PHONY: cuda
cuda: $(TOOLS) $(if $(NVCC),,$(PYPI_NVCC))  ## Compile the CUDA code, without running it
	$(CMAKE) -S . -B build/cuda -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DJAX_EP_CUDA=ON -DJAX_EP_CUDA_ARCHITECTURES=90
	$(BIN)/cmake --build build/cuda --target _cuda

.PHONY: stubs
stubs: cuda $(DEV)  ## Write the extensions' type stubs in jax_ep
	$(BIN)/cmake --build build/cuda --target _cpu
	$(BIN)/python -m nanobind.stubgen -q -i build/cuda -m _cpu -o jax_ep/_cpu.pyi
	$(BIN)/python -m nanobind.stubgen -q -i build/cuda -m _cuda -o jax_ep/_cuda.pyi
	$(BIN)/ruff format jax_ep/_cpu.pyi jax_ep/_cuda.pyi

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

# Editable, since the tests run beside the sources, whose folder would hide an installed package. An install
# replaces the ones before it; each set of requirements holds the sets before it.
define install
	@rm -f $(VENV)/.*-cuda-*
	@echo "Installing jax_ep into $(VENV), with JAX_EP_CUDA=$(JAX_EP_CUDA): minutes at first"
	@$(PIP) install --editable '.[$(1)$(CUDA_EXTRA)]'
	@touch $(addprefix $(VENV)/.,$(addsuffix -cuda-$(JAX_EP_CUDA),$(2)))
endef

$(EXAMPLES): $(VENV)/pyvenv.cfg $(NATIVE_SOURCES)
	$(call install,examples,examples)

$(TEST): $(VENV)/pyvenv.cfg $(NATIVE_SOURCES)
	$(call install,test,examples test)

$(DEV): $(VENV)/pyvenv.cfg $(NATIVE_SOURCES)
	$(call install,dev,examples test dev)

$(DOCS): $(VENV)/pyvenv.cfg pyproject.toml
	$(PIP) install $(call requirements,["project"]["optional-dependencies"]["docs"])
	@touch $@

# NVIDIA's compiler, where no toolkit is installed.
$(PYPI_NVCC): $(VENV)/pyvenv.cfg pyproject.toml
	$(PIP) install $(call requirements,["tool"]["scikit-build"]["overrides"][0]["build"]["requires"])
	@touch $@

# For targets that compile but do not install.
$(TOOLS): $(VENV)/pyvenv.cfg pyproject.toml
	$(PIP) install 'cmake>=3.24' ninja 'nanobind>=2.7' 'jax>=0.10.2'
	@touch $@
