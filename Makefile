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

VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py $(shell find csrc -type f)

.PHONY: demo test test-all bench lint sdist-check clean

demo: $(VENV)/built
	$(PY) benchmarks/demo.py

test: $(VENV)/built
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

# also the exhaustive and large cases: up to 12 GiB of memory
test-all: $(VENV)/built
	$(PY) -m pytest $(PYTEST_ARGS)

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
	for part in csrc epsa_fused tests benchmarks; do \
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

clean:
	rm -rf $(VENV) build *.egg-info epsa_fused/*.so
