# Every target is one command that also works by hand. The first one that needs it creates .venv and builds the extension.
PYTHON ?= python3
VENV := .venv/bin/python
PEERS := .venv-peers/bin/python
DOCS := .venv-docs/bin/python
# `make aot-newest` compiles the kernels with this Triton, `make aot-3.7.1` with another one
NEWEST_TRITON := 3.9.0
# the build finds ninja here
export PATH := $(CURDIR)/.venv/bin:$(PATH)

CXX_FILES := $(shell find contrastive_kernels/csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc')

.PHONY: demo test test-fast test-install test-peers test-versions bench bench-peers bench-distributed lint format interpret aot aot-newest gpu sanitize
.PHONY: clean
.PRECIOUS: .venv-triton-%/installed

demo: .venv/built      ## compare time and memory on this machine, about three minutes
	$(VENV) -m benchmarks --preset demo

test: .venv/built lint ## style, types and all tests, two files at a time, the long ones first; GPU tests skip themselves
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/built ## what finds most mistakes, in about two and a half minutes
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist worksteal -m "not slow"

test-peers: .venv/built .venv-peers/installed  ## losses and adapters against the published ones of other packages, in .venv-peers
	$(PEERS) -m pytest -m peers tests/package tests/compat

test-install: .venv/installed  ## every ordinary way of installing, each in a new environment: about a quarter of an hour
	$(VENV) -m tests.install.paths

test-versions: .venv/installed ## the fast tests with four pairs of Python and torch, and docs/versions.md: about twenty minutes
	$(VENV) -m tests.install.versions

bench: .venv/built     ## every loss, more sizes and dtypes: about half an hour
	$(VENV) -m benchmarks --losses all --dims 128 512 --dtypes float32 bfloat16

bench-peers: .venv/built .venv-peers/installed ## every loss that a training library has, ours beside theirs, and every adapter, about fifteen minutes
	$(PEERS) -m benchmarks --preset peers --output results/peers
	$(PEERS) -m benchmarks.adapters --output results/adapters

bench-distributed: .venv/built .venv-peers/installed  ## group= on two processes of one thread, beside published losses
	OMP_NUM_THREADS=1 $(PEERS) -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.distributed

lint: .venv/installed  ## style and types
	$(VENV) -m ruff check . && $(VENV) -m ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV) -m mypy

format: .venv/installed
	$(VENV) -m ruff check --fix . && $(VENV) -m ruff format .
	.venv/bin/clang-format -i $(CXX_FILES)

interpret: .venv/built ## the Triton kernels in the interpreter
	TRITON_INTERPRET=1 $(VENV) -m pytest -m interpret

aot: .venv/built       ## the Triton kernels compiled for GPUs that are not here
	$(VENV) -m pytest -m aot

aot-newest: aot-$(NEWEST_TRITON)  ## the same with the newest Triton, in an environment of its own, and the tests of the launch code

aot-%: .venv-triton-%/installed FORCE
	.venv-triton-$*/bin/python -m pytest tests/triton/test_aot.py tests/triton/test_host.py

gpu:                   ## what results/gpu lacks of smoke test, check, GPU tests and benchmark, nine minutes a call, with the machine's own Python; PART="tests d128" for some
	$(PYTHON) -m benchmarks.gpu $(if $(PART),--parts $(PART))

.PHONY: docs
docs: .venv/built .venv-docs/installed  ## the documentation site in docs/_build/html; notebooks run, warnings and broken links fail
	$(DOCS) -m sphinx -W --keep-going docs docs/_build/html
	$(DOCS) docs/links.py docs/_build/html

sanitize: .venv/installed
	bash contrastive_kernels/csrc/sanitize.sh

clean:
	rm -rf .venv .venv-install .venv-peers .venv-triton-* .venv-versions build dist results *.egg-info contrastive_kernels/*.so
	rm -rf .venv-docs docs/_build docs/losses docs/reference.md

.venv/installed: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -r requirements-dev.txt
# a CUDA build of torch brings its own Triton; the tables were made with this one; not every machine has a wheel
	$(VENV) -c "import triton" 2>/dev/null || $(VENV) -m pip install triton==3.6.0 \
		|| echo "There is no Triton for this machine: its tests skip themselves, all else works without."
	touch $@

.venv/built: .venv/installed setup.py pyproject.toml $(CXX_FILES)
	$(VENV) -m pip install --no-build-isolation --no-deps -e .
	touch $@

# an environment that sees the packages of .venv behind its own
define environment
	$(VENV) -m venv $(1)
	$(VENV) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth"
endef

# order only: a new build of the extension needs no new packages
.venv-peers/installed: requirements-peers.txt | .venv/installed
	$(call environment,.venv-peers)
	$(PEERS) -m pip install --no-deps -r requirements-peers.txt
	touch $@

.venv-docs/installed: requirements-docs.txt | .venv/installed
	$(call environment,.venv-docs)
	$(DOCS) -m pip install -r requirements-docs.txt
	touch $@

.venv-triton-%/installed: | .venv/built
	$(call environment,.venv-triton-$*)
	.venv-triton-$*/bin/python -m pip install --no-deps triton==$*
	touch $@

FORCE:
