# make demo: installs what it needs into .venv, runs the main job, writes demo.png.
# make test: installs what it needs, builds, runs every test. make check: style, types and ABI.
PYTHON ?= python3
VENV ?= .venv
# Any torch >= 2.10 will do; a range would let pip fetch the newest CUDA build, gigabytes of it.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt

.PHONY: demo test cpp cpp-libraries check format wheel resources bench print-torch clean

demo: $(VENV)/.demo
	$(BIN)/csp demo

test: $(VENV)/.dev cpp
	$(BIN)/python -m pytest

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" numpy
	$(BIN)/pip install --quiet --disable-pip-version-check "scikit-build-core>=0.10" "pybind11>=2.13" ninja cmake
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@ $(VENV)/.demo

# GoogleTest and Boost.Context are Debian's: installed where we are root there, otherwise their absence is said and the
# tests that need them skip.
cpp-libraries:
	@sh tools/cpp_test_libraries.sh

# The C++ tests: optimised, with those of the CUDA kernels in the SIMT harness; again under AddressSanitizer and
# UndefinedBehaviorSanitizer; and, where there are a GPU and nvcc, for the GPU.
cpp: $(VENV)/.torch cpp-libraries
	@presets="cpp asan"; \
	if nvidia-smi -L >/dev/null 2>&1 && command -v nvcc >/dev/null; then presets="$$presets cuda"; fi; \
	for preset in $$presets; do \
	  $(BIN)/cmake --preset $$preset -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja --log-level=WARNING && \
	  $(BIN)/cmake --build --preset $$preset -- --quiet || exit 1; \
	done

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'cpp_tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/torch-abi-audit --check torch csp_ext

format: $(VENV)/.dev
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	git ls-files 'csrc/*' 'cpp_tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format -i

# Shares its build folder with the editable install, so that nothing is compiled twice.
wheel: $(VENV)/.torch
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

# Registers, shared memory and spills of every CUDA kernel; fails where one spills. Needs nvcc, no GPU.
resources: $(VENV)/.dev
	$(BIN)/python tools/cuda_resources.py --check

bench: $(VENV)/.dev
	$(BIN)/python bench/run_all.py

print-torch:
	@echo "$(TORCH)"

clean:
	rm -rf build dist $(VENV)
