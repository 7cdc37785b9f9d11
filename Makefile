# make demo   set up, then the main job on photographs and a quick benchmark
# make test   set up, then the tests
# Both create .venv here and build the extension in place; nothing else is touched.

PYTHON ?= python3
# The torch that is developed with; any >= 2.11 works. On Linux, plain `torch` from
# PyPI brings several GB of CUDA packages: for a CPU-only one, install
# `torch==2.13.0+cpu` from PyTorch's own index by
#   make TORCH="torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# Half of the suite waits for single-threaded programs: compilers, emulators, imports of torch.
# Two test processes, each of whole files so that fixtures are made once, keep two cores busy.
TEST_PROCESSES ?= 2
PYTEST := -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py $(shell find csrc -type f)

.PHONY: demo test test-all bench lint sdist-check clean
.PHONY: cuda-check gpu-test gpu-sanitize gpu-bench gpu-plans

demo: $(VENV)/built
	$(PY) benchmarks/demo.py

test: $(VENV)/built
	$(PY) $(PYTEST) -m "not slow" $(PYTEST_ARGS)

# also the exhaustive and large cases: up to 12 GiB of memory
test-all: $(VENV)/built
	$(PY) $(PYTEST) $(PYTEST_ARGS)

bench: $(VENV)/built
	$(PY) benchmarks/latency.py

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# the source distribution holds what its build needs
sdist-check: $(VENV)/installed
	rm -rf build/sdist && mkdir -p build/sdist/unpacked
	$(PY) -m build --sdist --no-isolation --outdir build/sdist . > build/sdist/log 2>&1 || \
	  { cat build/sdist/log; exit 1; }
	tar -xzf build/sdist/epsa_fused-*.tar.gz -C build/sdist/unpacked --strip-components 1
	for part in csrc epsa_fused tests benchmarks examples; do \
	  diff -rq -x __pycache__ -x '*.so' $$part build/sdist/unpacked/$$part || exit 1; done

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print('\n'.join(r for e in p['optional-dependencies'].values() for r in e))" \
	  > $(VENV)/requirements.txt
	$(PY) -m pip install --quiet -r $(VENV)/requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "compiling the extension (about a minute)"
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
	  $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# ---- CUDA ----

# The CUDA build of torch and its nvidia packages (2.2 GB), in an environment of their own, and a
# full build against them: compile, link, import, kernels registered. Needs nvcc, not a GPU.
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

# On a machine with an NVIDIA GPU, nvcc and a torch with CUDA, which these use as they are: nothing
# is installed. They build in place for the GPU that is there.
GPU_PYTHON ?= python3
GPU_BUILD := build/gpu

# what the GPU machine's own torch runs: the tests of the operator, on the GPU
gpu-test: $(GPU_BUILD)/built
	$(GPU_PYTHON) -m pytest -m "not slow" -k cuda --ignore tests/cuda/test_compile.py $(PYTEST_ARGS)

# compute-sanitizer's four tools over the case table, without torch
gpu-sanitize: $(GPU_BUILD)/cases
	bash benchmarks/sanitize.sh $(GPU_BUILD)/cases

gpu-bench: $(GPU_BUILD)/built
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py $(BENCH_ARGS)

# every launch plan of EPSANet's stages, timed without torch: is the best one ranked first?
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

$(GPU_BUILD)/cases: $(SOURCES) $(wildcard tests/simt/*)
	mkdir -p $(GPU_BUILD)
	"$(CUDA_HOME)/bin/nvcc" -std=c++20 -O2 -Icsrc -lineinfo -arch=native -o $@ \
	  tests/simt/case_program.cpp tests/simt/test_plans.cpp csrc/cuda/plan.cpp \
	  csrc/cuda/launch.cu

$(GPU_BUILD)/plans: $(SOURCES) benchmarks/plans.cu
	mkdir -p $(GPU_BUILD)
	"$(CUDA_HOME)/bin/nvcc" -std=c++20 -O2 -Icsrc -arch=native -o $@ \
	  benchmarks/plans.cu csrc/cuda/plan.cpp csrc/cuda/launch.cu

clean:
	rm -rf $(VENV) $(CUDA_VENV) build *.egg-info epsa_fused/*.so
