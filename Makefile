# The two commands of a new user: `make demo` and `make test`. Each makes its own virtual environment
# (.venv) on first use; needed on the machine: Python >= 3.10, make and a C++17 compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu' 'tests/*.cuh' 'benchmarks/*.cpp' 2>/dev/null)
PY := pyfuse kernels tests benchmarks examples setup.py

.PHONY: help demo models test test-gpu test-triton-newest test-cpp test-san test-tsan test-arm lint format bars bench bench-gpu clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# Where nvcc is found, pyfuse._cuda is built: here for this machine's GPU; without one for Hopper alone, which all kernels
# have code for, since tests compile what they emulate by themselves. An install outside of this Makefile builds for all that it knows.
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd' '),9.0a)

# Installed again whenever something that is compiled or declared has changed; CMake then builds
# only what is out of date. Python sources are used in place.
$(BIN)/pyfuse: pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard cmake/* csrc/*.cpp csrc/*/* csrc/*/*/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(BIN)/pyfuse

models: $(BIN)/pyfuse ## fetch the two demonstration models (about 100 MB, once)
	$(BIN)/pyfuse models fetch smollm2 minilm

demo: $(BIN)/pyfuse ## two real models, stock and accelerated, side by side
	$(BIN)/pyfuse demo

# A process for each core, but no more than four: each has torch in memory. Their threads sleep while they wait; spinning,
# as they do by themselves, they would take the cores from each other: four times slower.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses=4

test: $(BIN)/pyfuse ## every test; those of the real models run once `make models` has fetched them
	$(PYTEST)

test-gpu: $(BIN)/pyfuse ## every backend test on emulated GPUs, of which make test runs a sample
	$(PYTEST) --emulated=only $(ARGS)

TRITON_NEWEST ?= 3.9.0
# Tiles are chosen for the registers that the pinned Triton needs, so what only counts these is left out; and so are the
# tests of the emulator itself. Every kernel is compiled anew for it, so the sample is a smaller one.
test-triton-newest: $(BIN)/pyfuse ## the tests that run Triton kernels, in samples as above, with the newest Triton
	test -d build/triton-$(TRITON_NEWEST) || $(BIN)/python -m pip install --quiet --no-deps \
	  --target build/triton-$(TRITON_NEWEST) triton==$(TRITON_NEWEST)
	PYTHONPATH=build/triton-$(TRITON_NEWEST) $(PYTEST) -m "triton and not ahead_of_time" --ignore=tests/ptxemu --sample=48 $(ARGS)

# The three below need no Python, only cmake (the virtual environment's, or the system's) and a compiler.
# ARGS: --slow, --isa=avx2, a part of a test's name.
test-cpp test-san test-arm: export PATH := $(CURDIR)/$(BIN):$(PATH)
# Of x86's instruction sets those that run here; elsewhere all.
CPU := $(shell grep -m 1 '^flags' /proc/cpuinfo 2>/dev/null)
ISAS := $(if $(CPU),baseline$(if $(filter avx2,$(CPU)),;avx2)$(if $(filter avx512bw,$(CPU)),;avx512)$(if $(filter avx512_bf16,$(CPU)),;avx512_bf16))
define run_cpp_tests # folder of the build, options for cmake, what runs the program
	@command -v cmake >/dev/null || { echo "$@ needs cmake (Debian: apt install cmake)" >&2; exit 1; }
	cmake -S . -B build/$(1) -DPYFUSE_CPP_TESTS=ON $(2) >/dev/null
	env -u MAKELEVEL -u MAKEFLAGS cmake --build build/$(1) --parallel $$(getconf _NPROCESSORS_ONLN)
	OMP_NUM_THREADS=2 $(3) build/$(1)/cpp_tests $(ARGS)
endef

test-cpp: ## the C++ tests of the kernels, every instruction set of this machine
	$(call run_cpp_tests,cpp,-DCMAKE_BUILD_TYPE=Release -DPYFUSE_ISAS='$(ISAS)')

SANITIZE := -O1 -g1 -fexpensive-optimizations -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
test-san: ## the same under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call run_cpp_tests,san,-DCMAKE_BUILD_TYPE=Debug -DPYFUSE_ISAS='$(ISAS)' -DCMAKE_CXX_FLAGS_DEBUG="$(SANITIZE)")

# Only pyfuse._C knows of the sanitizer, so each process has one thread of OpenMP. First a race that has to be found.
TSAN_RUN = LD_PRELOAD=$$($(CXX) -print-file-name=libtsan.so) OMP_NUM_THREADS=1 PYTHONPATH=build/tsan/site:tests \
  TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" $(BIN)/python tests/engine_stress.py
test-tsan: export PATH := $(CURDIR)/$(BIN):$(PATH)
test-tsan: $(BIN)/pyfuse ## many requests from many threads to one engine, under ThreadSanitizer
	cmake -S . -B build/tsan -DCMAKE_BUILD_TYPE=Debug -DPYFUSE_CUDA=off -DPYFUSE_ISAS='$(ISAS)' \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
	  -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1 -fsanitize=thread -fno-omit-frame-pointer" >/dev/null
	env -u MAKELEVEL -u MAKEFLAGS cmake --build build/tsan --target _C --parallel $$(getconf _NPROCESSORS_ONLN)
	rm -rf build/tsan/site && mkdir -p build/tsan/site && cp -r pyfuse build/tsan/site/
	cp kernels/*.py build/tsan/site/pyfuse/kernels/ && cp build/tsan/_C*.so build/tsan/site/pyfuse/
	$(TSAN_RUN) 0 >/dev/null 2>&1; test $$? -eq 66 || { echo "test-tsan: a race was not found" >&2; exit 1; }
	$(TSAN_RUN) 6

ARM_CXX ?= aarch64-linux-gnu-g++
ARM_LIBRARIES ?= /usr/aarch64-linux-gnu
QEMU = $(firstword $(foreach name,qemu-aarch64-static qemu-aarch64,$(shell command -v $(name))))
test-arm: ## the same for NEON: compiled for AArch64, run by qemu
	@command -v $(ARM_CXX) >/dev/null && test -n "$(QEMU)" || { echo "test-arm needs $(ARM_CXX)" \
	  "and qemu-aarch64 (Debian: apt install g++-aarch64-linux-gnu qemu-user-static)" >&2; exit 1; }
	$(call run_cpp_tests,arm,-DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX),$(QEMU) -L $(ARM_LIBRARIES))

lint: $(BIN)/pyfuse ## ruff, formatting of Python and C++, types
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(BIN)/pyfuse ## let the formatters write
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

bars: $(BIN)/pyfuse models ## measure every promised figure: figure, target, met or missed
	$(BIN)/python -m benchmarks.bars

bench: $(BIN)/pyfuse ## kernels against torch, interleaved; what Python costs in a launch on a GPU
	$(BIN)/python -m benchmarks.bench_attention
	$(BIN)/python -m benchmarks.bench_decode
	$(BIN)/python -m benchmarks.bench_rope
	$(BIN)/python -m benchmarks.bench_embed
	$(BIN)/python -m benchmarks.bench_norm
	$(BIN)/python -m benchmarks.bench_launch

bench-gpu: $(BIN)/pyfuse ## on a GPU: kernels against torch, FlexAttention, flash-attn and Liger (ARGS=--backend=cuda)
	$(BIN)/python -m benchmarks.bench_gpu $(ARGS)

clean: ## remove what was built, keep the models
	rm -rf $(VENV) build dist *.egg-info pyfuse/*.so
