# Two commands for a fresh clone: `make demo` and `make test`. They need Python 3.10+, a C++20 compiler and make; everything else
# goes into .venv. A torch that pip would not choose by itself can be named: make demo TORCH="torch==2.13.0 --index-url ...".
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST_ARGS ?=

SOURCES := $(shell find csrc cmake third_party -type f 2>/dev/null) CMakeLists.txt pyproject.toml

.PHONY: help demo test lint cuda-check cuda-report emulate-cuda wheel-check sanitize emulate clean

help:
	@echo "make demo         train a Samba model on real text, measure it, generate from it"
	@echo "make test         build and run every test"
	@echo "make lint         ruff, mypy, clang-format"
	@echo "make cuda-check   compile the CUDA operators for sm_80 and sm_90a without linking or optimising (needs nvcc)"
	@echo "make cuda-report  registers, spills and instructions of the CUDA kernels, into docs/cuda-kernels.md (needs cuobjdump)"
	@echo "make emulate-cuda the CUDA operators on an emulated device, under sanitizers (needs the CUDA headers, no GPU)"
	@echo "make wheel-check  build a wheel in isolation, install it in a fresh environment, run it"
	@echo "make emulate      the AVX-512 levels as emulated AVX2 code, against the reference (needs libsimde-dev)"
	@echo "make sanitize     operator tests under the address and undefined-behaviour sanitizers, at every level of this CPU"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: the package itself accepts any torch from 2.11 on.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

$(VENV)/.tools: pyproject.toml | $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check "scikit-build-core>=0.10" "pybind11>=2.13" cmake ninja
	@touch $@

# An editable install: Python is read from the checkout, the libraries are rebuilt when a C++ source changes.
$(VENV)/.fastlm: $(SOURCES) $(VENV)/.tools
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.fastlm
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	@touch $@

# Threads that wait for each other give way: there are more of them than cores when tests run side by side.
test sanitize emulate emulate-cuda: export OMP_WAIT_POLICY = passive

demo: $(VENV)/.fastlm
	$(BIN)/fastlm demo --out runs/demo --replace

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# Compiled quickly where this nvcc can (a third of the time): what it says about performance means nothing here. A warning is an error.
cuda-check: CUDA_FLAGS = -O0 $(if $(findstring Ofast-compile,$(shell nvcc --help)),-Ofc=max)
cuda-report: CUDA_FLAGS = -O3
cuda-check cuda-report: $(VENV)/.tools
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DFASTLM_CUDA_COMPILE_ONLY=ON -DFASTLM_PYTHON_MODULE=OFF -DFASTLM_CPU_LEVELS=default "-DCMAKE_CUDA_FLAGS=-Werror=all-warnings" "-DCMAKE_CUDA_FLAGS_RELEASE=$(CUDA_FLAGS) -DNDEBUG"
	$(BIN)/cmake --build build/$@ --parallel $(JOBS) --target fastlm_cuda_kernels fastlm_cuda_adapters
	$(if $(filter cuda-report,$@),$(BIN)/python tools/cuda_report.py --write --check)

wheel-check: $(VENV)/.torch
	sh tools/wheel_check.sh $(PYTHON) "$(TORCH)"

sanitize: $(VENV)/.dev
	JOBS=$(JOBS) sh tools/sanitize.sh $(abspath $(BIN)) $(PYTEST_ARGS)

emulate-cuda: $(VENV)/.dev
	JOBS=$(JOBS) sh tools/emulate_cuda.sh $(abspath $(BIN)) $(PYTEST_ARGS)

emulate: $(VENV)/.dev
	JOBS=$(JOBS) sh tools/emulate.sh $(abspath $(BIN)) $(PYTEST_ARGS)

clean:
	rm -rf build $(VENV)
