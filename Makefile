# make demo         sets up, then runs the operator and EPSANet-50 on photographs
# make test         sets up, then runs the tests
# make docs         builds the documentation site in build/docs; docs-serve shows it while you edit
# All create .venv here, with the packages that they need, and build the extension in place. Nothing
# else is touched.

PYTHON ?= python3
# The torch that is developed with; any >= 2.11 works. On Linux, PyPI's torch brings several GB of
# CUDA packages. PyTorch's own index has one for the CPU alone:
#   make demo TORCH="torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# Half of the suite waits for single-threaded programs: compilers, emulators, imports of torch.
# Two test processes, each of whole files so that fixtures are made once, keep two cores busy.
TEST_PROCESSES ?= 2
PYTEST := -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# Python compiles the few modules that are imported; pip would compile all of torch's.
PIP := $(PY) -m pip install --no-compile
PROGRESS := $(PYTHON) .ci/progress.py
SOURCES := setup.py $(shell find csrc -type f)

.PHONY: demo test test-all check-torch compat bench lint sdist-check wheel wheel-check docs docs-serve
.PHONY: clean aarch64-check
.PHONY: cuda-check gpu-test gpu-sanitize gpu-sanitize-module gpu-bench gpu-plans gpu-first-hour

demo: $(VENV)/built $(VENV)/packages-demo
	@$(PROGRESS) $(PY) benchmarks/demo.py

test: $(VENV)/built $(VENV)/packages-dev
	$(PY) $(PYTEST) -m "not slow" $(PYTEST_ARGS)

# also the exhaustive and large cases: up to 12 GiB of memory
test-all: $(VENV)/built $(VENV)/packages-dev
	$(PY) $(PYTEST) $(PYTEST_ARGS)

# The suite with another torch, in a copy of this checkout with an environment of its own:
#   make check-torch TORCH=torch==2.11.0
# PYTHON=python3.10 takes another Python, and PYTEST_ARGS a part of the suite.
TORCH_COPY = build/$(subst ==,-,$(firstword $(TORCH)))-$(notdir $(PYTHON))

check-torch:
	mkdir -p $(TORCH_COPY)
	git ls-files -z | tar --null --files-from - -cf - | tar -xf - -C $(TORCH_COPY)
	$(MAKE) -C $(TORCH_COPY) test TORCH="$(TORCH)"

# all tools that look into models, and timm; `make test` has the light ones. timm's torchvision must be
# made for the torch that is there: PyPI has such for PyPI's.
compat: $(VENV)/built $(VENV)/packages-compat
	$(PY) -m pytest tests/package/test_tools.py tests/models \
	  tests/package/test_examples.py tests/package/test_gallery.py

bench: $(VENV)/built $(VENV)/packages-demo
	$(PY) benchmarks/latency.py

lint: $(VENV)/packages-dev $(VENV)/torch
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	git ls-files -- '*.cpp' '*.h' '*.inc' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

# the source distribution holds what its build needs
sdist-check: $(VENV)/packages-dev $(VENV)/torch
	rm -rf build/sdist && mkdir -p build/sdist/unpacked
	$(PY) -m build --sdist --no-isolation --outdir build/sdist . > build/sdist/log 2>&1 || \
	  { cat build/sdist/log; exit 1; }
	tar -xzf build/sdist/epsa_fused-*.tar.gz -C build/sdist/unpacked --strip-components 1
	for part in csrc epsa_fused tests benchmarks examples docs scripts .ci .github; do \
	  diff -rq -x __pycache__ -x '*.so' $$part build/sdist/unpacked/$$part || exit 1; done

# for the torch of .venv, into dist
wheel: $(VENV)/torch $(VENV)/packages-wheel
	@$(PROGRESS) --compile build/log $(PY) scripts/wheel.py dist
	@ls -sh dist

# installs such a wheel in other environments
wheel-check: $(VENV)/built $(VENV)/packages-dev $(VENV)/packages-wheel
	$(PY) -m pytest tests/package/test_wheel.py $(PYTEST_ARGS)

# the CPU kernels' cases for 64-bit ARM, in an emulator; a minute or two
AARCH64_CXX ?= aarch64-linux-gnu-g++
aarch64-check:
	@for tool in $(AARCH64_CXX) qemu-aarch64; do command -v $$tool > /dev/null || { \
	  echo "$$tool is missing: apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	mkdir -p build/aarch64
	for noun in attention conv; do \
	  upper=$$(echo $$noun | tr a-z A-Z); \
	  $(AARCH64_CXX) -std=c++17 -O1 -Wall -Wextra -Werror -Wno-psabi -Wno-maybe-uninitialized -static \
	    -Icsrc -DEPSA_CASES_$$upper -DEPSA_VEC_BYTES=16 -o build/aarch64/$$noun \
	    tests/cpu_cases/one_isa.cpp tests/cpu_cases/$${noun}_cases.cpp csrc/cpu/isa.cpp \
	    csrc/cpu/$${noun}_plan.cpp && \
	  qemu-aarch64 build/aarch64/$$noun || exit 1; done
	$(AARCH64_CXX) -std=c++17 -O1 -Wall -Wextra -Werror -Wno-psabi -static -Icsrc -DEPSA_VEC_BYTES=16 \
	  -o build/aarch64/conversions tests/cpu_cases/conversions.cpp
	qemu-aarch64 build/aarch64/conversions

docs: $(VENV)/packages-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo "build/docs/index.html"

docs-serve: $(VENV)/packages-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

# ---- set-up ----

$(VENV)/created:
	$(PROGRESS) $(PYTHON) -m venv $(VENV)
	$(PROGRESS) --bars $(PIP) --upgrade pip
	touch $@

$(VENV)/torch: | $(VENV)/created
	@echo "installing torch: minutes, most of them for the download"
	$(PROGRESS) --bars $(PIP) $(TORCH)
	touch $@

# the extras of pyproject.toml that targets need
$(VENV)/packages-build: EXTRAS := build
$(VENV)/packages-demo: EXTRAS := bench
$(VENV)/packages-dev: EXTRAS := build test train bench lint tools
$(VENV)/packages-wheel: EXTRAS := build wheel
$(VENV)/packages-docs: EXTRAS := docs
$(VENV)/packages-compat: EXTRAS := test tools compat train gallery
$(VENV)/packages-%: pyproject.toml | $(VENV)/created
	@$(PY) scripts/requirements.py $(EXTRAS) > $(VENV)/$*.txt
	@$(PY) -m pip freeze | sed -n '/^torch==/p' > $(VENV)/kept.txt # no package replaces the torch
	$(PROGRESS) --bars $(PIP) -c $(VENV)/kept.txt -r $(VENV)/$*.txt
	touch $@

# In place, by ninja in a folder that stays: another build compiles only what changed. pip's
# editable installation would compile everything again.
$(VENV)/built: $(VENV)/torch $(VENV)/packages-build $(SOURCES)
	@echo "compiling: two to four minutes of processor time in all, shared by $$(nproc) cores"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PROGRESS) --compile build/log \
	  $(PY) setup.py egg_info build_ext --inplace --build-temp build/temp
	@$(PY) -c "import pathlib, sysconfig; \
	  pathlib.Path(sysconfig.get_path('purelib'), 'epsa_fused.pth').write_text('$(CURDIR)\n')"
	touch $@

# ---- CUDA ----

# Installs torch with CUDA and its nvidia packages (2.2 GB) in an environment of their own. Then it
# compiles, links and imports the extension against them. It needs nvcc, but no GPU.
CUDA_TORCH ?= torch==2.11.0
CUDA_VENV := .venv-cuda
CUDA_HOME ?= $(firstword $(wildcard /usr/local/cuda) $(patsubst %/bin/nvcc,%,$(shell command -v nvcc)))

cuda-check: $(CUDA_VENV)/installed
	@echo "compiling the extension for every architecture (about five minutes on two cores)"
	mkdir -p build/cuda/lib
	EPSA_CUDA=1 CUDA_HOME="$(CUDA_HOME)" PATH="$(CURDIR)/$(CUDA_VENV)/bin:$$PATH" \
	  $(CUDA_VENV)/bin/python setup.py build --build-base build/cuda --build-lib build/cuda/lib \
  egg_info --egg-base build/cuda/lib \
	  > build/cuda/log 2>&1 || { tail -n 50 build/cuda/log; exit 1; }
	cd build/cuda/lib && "$(CURDIR)/$(CUDA_VENV)/bin/python" -m epsa_fused
	cd build/cuda/lib && "$(CURDIR)/$(CUDA_VENV)/bin/python" -c "import torch, epsa_fused; \
	  has = torch._C._dispatch_has_kernel_for_dispatch_key; \
	  ops = ['epsa_fused::psa_attention', 'epsa_fused::psa_attention_backward']; \
	  assert all(has(op, 'CUDA') for op in ops), 'no CUDA kernels'; \
	  print('CUDA kernels registered:', *ops)"

$(CUDA_VENV)/installed:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(CUDA_VENV)/bin/python -m pip install --quiet $(CUDA_TORCH) numpy ninja pybind11 "setuptools>=77,<82"
	touch $@

# These need a machine with an NVIDIA GPU, nvcc and a torch with CUDA. They install nothing and build
# in place for the GPU that is there.
GPU_PYTHON ?= python3
GPU_BUILD := build/gpu

# all of the following, most wanted first; may be stopped and goes on where it was
gpu-first-hour:
	$(GPU_PYTHON) benchmarks/first_hour.py $(BENCH_ARGS)

# the operator's tests on the GPU, with the torch that is there
gpu-test: $(GPU_BUILD)/built
	$(GPU_PYTHON) -m pytest -m "gpu and not slow" $(PYTEST_ARGS)

# compute-sanitizer's four tools over the case table, without torch
gpu-sanitize: $(GPU_BUILD)/cases
	bash benchmarks/sanitize.sh $(GPU_BUILD)/cases

# the same over whole modules, with the torch that is there: the convolutions, too
gpu-sanitize-module: $(GPU_BUILD)/built
	for tool in memcheck racecheck synccheck; do \
	  PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
	    --error-exitcode 99 $(GPU_PYTHON) benchmarks/sanitize_module.py || exit 1; done

# the attention step, modules and networks, in inference and in training. A part of it:
#   make gpu-bench BENCH_ARGS="--part network --minutes 7"
gpu-bench: $(GPU_BUILD)/built
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py $(BENCH_ARGS)

# times every launch plan of EPSANet's stages, without torch: is the best one ranked first?
gpu-plans: $(GPU_BUILD)/plans
	device=$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | \
	  tr '[:upper:] ' '[:lower:]-') && \
	  $(GPU_BUILD)/plans "benchmarks/results/$$device-plans.csv"

$(GPU_BUILD)/built: $(SOURCES)
	mkdir -p $(GPU_BUILD)
	rm -f $(VENV)/built
	EPSA_CUDA=1 CUDA_HOME="$(CUDA_HOME)" $(GPU_PYTHON) setup.py egg_info build_ext --inplace \
	  --build-temp $(GPU_BUILD)/temp > $(GPU_BUILD)/log 2>&1 || \
	  { tail -n 50 $(GPU_BUILD)/log; exit 1; }
	touch $@

# cases-ptx holds PTX of the oldest architecture alone: the driver compiles it for the GPU
$(GPU_BUILD)/cases: NVCC_ARCH := -arch=native
$(GPU_BUILD)/cases-ptx: NVCC_ARCH := -gencode=arch=compute_80,code=compute_80
$(GPU_BUILD)/cases $(GPU_BUILD)/cases-ptx: $(SOURCES) $(wildcard tests/simt/* tests/simt/cases/*)
	mkdir -p $(GPU_BUILD)
	"$(CUDA_HOME)/bin/nvcc" -std=c++20 -O2 -Icsrc -Itests/simt -lineinfo $(NVCC_ARCH) -o $@ \
	  $(wildcard tests/simt/cases/*.cpp) tests/simt/test_plans.cpp csrc/cuda/plan.cpp \
	  csrc/cuda/launch.cu

$(GPU_BUILD)/plans: $(SOURCES) benchmarks/plans.cu
	mkdir -p $(GPU_BUILD)
	"$(CUDA_HOME)/bin/nvcc" -std=c++20 -O2 -Icsrc -arch=native -o $@ \
	  benchmarks/plans.cu csrc/cuda/plan.cpp csrc/cuda/launch.cu

clean:
	rm -rf $(VENV) $(CUDA_VENV) build *.egg-info epsa_fused/*.so
