# The two commands of a new user: `make demo` and `make test`. Each makes its own virtual environment
# (.venv) on first use; needed on the machine: Python >= 3.10, make and a C++17 compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'tests/*.cpp' 'benchmarks/*.cpp' 2>/dev/null)
PY := pyfuse tests benchmarks setup.py

.PHONY: help demo models test lint format bars bench clean
help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# Installed again whenever something that is compiled or declared has changed; CMake then builds
# only what is out of date. Python sources are used in place.
$(BIN)/pyfuse: pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(BIN)/pyfuse

models: $(BIN)/pyfuse ## fetch the two demonstration models (about 100 MB, once)
	$(BIN)/pyfuse models fetch smollm2 minilm

demo: $(BIN)/pyfuse ## two real models, stock and accelerated, side by side
	$(BIN)/pyfuse demo

test: $(BIN)/pyfuse ## every test; those of the real models run once `make models` has fetched them
	$(BIN)/python -m pytest -q

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

bench: $(BIN)/pyfuse ## kernels against torch, interleaved
	$(BIN)/python -m benchmarks.bench_attention
	$(BIN)/python -m benchmarks.bench_rope
	$(BIN)/python -m benchmarks.bench_embed

clean: ## remove what was built, keep the models
	rm -rf $(VENV) build dist *.egg-info pyfuse/*.so
