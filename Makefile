# make quickstart   raw text -> tokenizer -> a model trained on 8 ranks -> generated text, in a few minutes on a laptop
# make test         the whole test suite                 make lint    ruff
# make kernels      the CUDA kernels, in place, for every target; needs nvcc (CUDA_HOME, PATH or /usr/local/cuda), no GPU
# make gpu-bundle   what an offline GPU machine lacks for tools/gpu_check.py, in one folder
# make .venv        the virtual environment only; the others make it first where it is missing or out of date
#
# On a machine without a GPU, `make .venv TORCH_INDEX=URL`, the index of torch's CPU wheels, saves the download of the CUDA libraries.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: quickstart test lint kernels gpu-bundle .venv

PYTHON ?= python3
TORCH_INDEX ?=
# A process of tests a core, four at most as each has ranks of its own; who is done takes half of what another has left.
PARALLEL ?= -n $(shell nproc) --maxprocesses 4 --dist worksteal
STAMP := .venv/.complete
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

quickstart: .venv
	.venv/bin/python -m megalm.tools.quickstart

test: .venv
	.venv/bin/python -m pytest $(PARALLEL) $(ARGS)

lint: .venv
	.venv/bin/ruff check .

kernels: .venv
	.venv/bin/python -m megalm.tools.build_kernels --table $(if $(CUDA_HOME),--nvcc $(CUDA_HOME)/bin/nvcc)

gpu-bundle: .venv
	.venv/bin/python -m megalm.tools.gpu_bundle

.venv: $(STAMP)

# The stamp is written last: an installation that broke half-way is made anew. deepspeed comes as source and needs torch, so it is
# built without isolation once torch is there, and builds none of its own operations. Megatron-Core is an oracle of the tests, without
# its dependencies. pip's warnings of package indexes that lack a package are left out; its errors are not.
PIP := .venv/bin/python -m pip install --quiet --constraint constraints.txt
$(STAMP): constraints.txt setup.py
	@set -euo pipefail; start=$$SECONDS; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer: make PYTHON=python3.11")'; \
	echo "installing into .venv (once; constraints.txt has the versions)"; \
	[ -e $(STAMP) ] || $(PYTHON) -m venv --clear .venv; \
	rm -f $(STAMP); \
	quiet() { "$$@" 2> >(grep -v -E "is ignored: it is neither a file nor a directory" >&2); }; \
	quiet $(PIP) pip setuptools; \
	quiet $(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch numpy ninja packaging py-cpuinfo psutil; \
	DS_BUILD_OPS=0 quiet $(PIP) --no-build-isolation deepspeed; \
	PYTHONWARNINGS=ignore MEGALM_BUILD_CUDA=0 quiet $(PIP) --no-build-isolation --editable '.[logging,corpus,tests]'; \
	quiet $(PIP) --no-deps megatron-core; \
	touch $(STAMP); echo "installed in $$((SECONDS - start)) s"
