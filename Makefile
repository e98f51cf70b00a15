# The front door. `make help` lists the targets; each does its own set-up.
#
# Variables: PYTHON (any Python >= 3.10), VENV (a folder, or "none" to use PYTHON as it is), BUILD (the CMake build folder), JOBS,
# CMAKE_FLAGS (more options for CMake), TEST_BINARY (a prebuilt C++ test program for gpu-test), SUITES (what gpu-test runs),
# TARGETS (what build builds; default all), BENCH_FLAGS.

SHELL := bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build/make
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
CMAKE_FLAGS ?=
TEST_BINARY ?=
SUITES ?=
TARGETS ?=
BENCH_FLAGS ?=

ifeq ($(VENV),none)
  PY := $(PYTHON)
  READY :=
  LINT_READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
  LINT_READY := $(VENV)/.lint-ready
  export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))

CXX_SOURCES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' '*.c')

.PHONY: help demo test test-cpp test-python bench gpu-pack gpu-test gpu-bench gpu-bench-transformers ledger-check lint format build gpu-build readme clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 24

$(VENV)/.ready: tools/requirements.txt tools/make_venv.py
	@$(PYTHON) tools/make_venv.py $(VENV)
	@touch $@ $(LINT_READY)

$(VENV)/.lint-ready: tools/requirements.txt tools/make_venv.py
	@$(PYTHON) tools/make_venv.py $(VENV) --lint
	@touch $@

# One CMake tree serves the library, the C++ tests and the Python extension, so that every file is compiled once. A tree that was carried
# here from another folder is configured afresh. The log keeps what ptxas said (tools/check_spills.py). The stamp says which sources were
# built: it is taken before the build, so that a source that changes meanwhile does not pass for built, and counts once all is built.
build: $(READY)  ## build the library, its tests and the Python extension
	@mkdir -p $(BUILD)
	@fresh=; grep -qsxF 'CMAKE_HOME_DIRECTORY:INTERNAL=$(CURDIR)' $(BUILD)/CMakeCache.txt || { fresh=--fresh; rm -f $(BUILD)/build.log; }; \
	cmake $$fresh -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DFLASH_MLA_PYTHON=ON -DFLASH_MLA_BUILD_TESTS=ON \
	  -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" $(CMAKE_FLAGS)
	@rm -f $(BUILD)/stamp.json && $(PY) tools/ledger.py stamp $(BUILD)/stamp.next
	@cmake --build $(BUILD) -j $(JOBS) $(if $(TARGETS),--target $(TARGETS)) 2>&1 | tee -a $(BUILD)/build.log \
	  | { grep -v '^ptxas info\|bytes stack frame' || true; }
	@$(if $(TARGETS),,mv $(BUILD)/stamp.next $(BUILD)/stamp.json)
	@$(MAKE) --no-print-directory link

.PHONY: link test-cpp test-python lint-python lint-cpp lint-text
link:
	@ln -sfn $(if $(filter /%,$(BUILD)),,../../)$(BUILD)/python/_C.abi3.so python/flash_mla/_C.abi3.so

demo:  ## decode a real text through an MLA layer and show what it saves
	@$(MAKE) --no-print-directory build TARGETS=flash_mla_python
	@$(PY) -m flash_mla.cli demo

test: build  ## build and test everything this machine can
	@if [ -n "$$(find $(BUILD) -name '*.cu.o' -print -quit)" ]; then $(PY) tools/check_spills.py $(BUILD); \
	else echo 'no nvcc: the CPU part alone was built and is tested; the CUDA code was neither compiled nor run'; fi
	@$(MAKE) --no-print-directory --keep-going test-cpp test-python

test-cpp:
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=ignore -j $(JOBS)

test-python:
	$(PY) -m pytest tests/python -q

bench:  ## time the CPU backend against the same maths in PyTorch
	@$(MAKE) --no-print-directory build TARGETS=flash_mla_python
	$(PY) bench/cpu/compare_torch.py $(BENCH_FLAGS)

# Binaries that were built elsewhere are used as they are when they were built from these very sources.
gpu-build: $(READY)
	@if $(PY) tools/ledger.py built $(BUILD); then $(MAKE) --no-print-directory link; else $(MAKE) --no-print-directory build; fi

gpu-pack: build  ## gather what gpu-test and gpu-bench need in build/gpu, for a machine without a network
	@rm -rf build/gpu && mkdir -p build/gpu/python build/gpu/tests/cpp build/gpu/bench
	@cp $(BUILD)/stamp.json build/gpu && cp $(BUILD)/python/_C.abi3.so build/gpu/python
	@cp $(BUILD)/tests/cpp/flash_mla_tests build/gpu/tests/cpp || echo 'gpu-pack: no C++ tests (no GoogleTest?)'
	@cp $(BUILD)/bench/flash_mla_host_time build/gpu/bench || echo 'gpu-pack: no C++ benchmark (no nvcc?)'
	@echo 'There: make gpu-test BUILD=build/gpu VENV=none'

gpu-test: gpu-build  ## run the GPU suites on a Hopper GPU and write tests/gpu-ledger.json
	$(PY) tools/gpu_test.py --build $(BUILD) $(if $(TEST_BINARY),--test-binary $(TEST_BINARY)) $(foreach suite,$(SUITES),--suite $(suite))

gpu-bench: gpu-build  ## time ours and the peers on a Hopper GPU and write bench/results
	$(PY) bench/run.py --build $(BUILD)
	$(PY) tools/readme_table.py

gpu-bench-transformers: gpu-build  ## time Transformers models with and without flash_mla on a Hopper GPU
	$(PY) bench/transformers.py --build $(BUILD)
	$(PY) tools/readme_table.py

ledger-check:  ## fail when GPU code is newer than its last run on a GPU
	@$(PYTHON) tools/ledger.py check

lint: $(LINT_READY)  ## check style, versions and generated text
	@$(MAKE) --no-print-directory --keep-going lint-python lint-cpp lint-text
	@$(PY) tools/ledger.py check || echo 'lint: the ledger is a warning only; a release needs make ledger-check green'
	@echo 'lint: clean'

lint-python:
	@ruff check -q .
	@ruff format -q --check .

lint-cpp:
	@if command -v clang-format >/dev/null; then clang-format --dry-run -Werror --ferror-limit=1 $(CXX_SOURCES); \
	else echo 'lint: clang-format is missing: the C++ style is not checked'; fi

lint-text:
	@$(PY) tools/check_text.py
	@$(PY) tools/check_version.py
	@$(PY) tools/readme_table.py --check

format: $(LINT_READY)  ## bring the sources into style
	@ruff check -q --fix .
	@ruff format -q .
	@clang-format -i $(CXX_SOURCES)

readme:  ## write README's tables and the plots in docs/ from bench/results
	@$(PYTHON) tools/readme_table.py

clean:  ## remove the build folder
	rm -rf $(BUILD) python/flash_mla/_C.abi3.so
