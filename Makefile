# What a person types here. Everything runs from .venv, which `make install` makes; nothing outside the clone is changed,
# except for the model cache (~/.cache/tensorweave).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install serve chat test lint lines pytest quick test-cluster bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Without an NVIDIA GPU, everything is installed in the versions with which CI runs. With one, torch and what it needs are the machine's own.
# Where pip would take a CUDA build of torch for a CPU, give the address of PyTorch's CPU wheels: make install TORCH_INDEX=URL
CONSTRAINTS ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo constraints.txt)
TORCH_INDEX ?=

MODEL ?=
CONFIG ?=
PORT ?=
QUESTION ?= What is the capital of France?

help: ## Say what there is
	@echo "tensorweave: multi-node LLM serving on Ray"; echo
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo; echo "  make serve MODEL=/path/or/hub-id CONFIG=service.yaml PORT=9000    all three are optional"

install: $(STAMP) ## Make .venv with everything in it (once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make install PYTHON=python3.12"; exit 1; }
	@if [ ! -x $(BIN)/python ]; then \
	  if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); else \
	    echo "This Python has no ensurepip (on Debian: apt install python3-venv); trying with its own pip."; \
	    $(PYTHON) -m venv --without-pip $(VENV); \
	    $(PYTHON) -m pip --python $(BIN)/python install -qq pip \
	      || { rm -rf $(VENV); echo "That failed too: install python3-venv, then try again."; exit 1; }; \
	  fi; \
	fi
	@echo "installing torch and the rest into $(VENV) (minutes the first time)"
	@$(PIP) install -qq $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch>=2.11'
	@$(PIP) install -qq $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --editable '.[dev]'
	@touch $(STAMP)

serve: install ## Serve a model on 127.0.0.1:8000, ask it one question, stay up until Ctrl-C
	@exec $(BIN)/tensorweave serve --ask '$(QUESTION)' $(if $(CONFIG),--config '$(CONFIG)') \
	  $(if $(MODEL),--model '$(MODEL)') $(if $(PORT),--set router.port=$(PORT)) $(if $(API_KEY),--api-key '$(API_KEY)')

chat: install ## Talk to the service that `make serve` started
	@exec $(BIN)/tensorweave chat --url http://127.0.0.1:$(or $(PORT),8000) $(if $(API_KEY),--api-key '$(API_KEY)')

test: lint lines pytest ## Everything that CI runs; with COVERAGE=1, also which lines the unit tests run

lint: install ## Format, lint, types, shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run $(wildcard slurm/*.sh slurm/*.sbatch tests/hosts/*.sh)

lines: install
	@$(BIN)/python .ci/line_table.py

# COVERAGE=1 traces the unit tests, runs the others without, and says which share of each room's lines the unit tests ran.
# Tracing doubles the processor time of what it traces (less where Python has sys.monitoring, 3.12): long loops over lines that other
# tests run too are marked no_cover.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
UNIT := not slow and not model and not hypothesis
COVERAGE ?=

ifdef COVERAGE
pytest: export COVERAGE_CORE ?= $(shell $(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')
endif

pytest: install
ifdef COVERAGE
	failed=0; $(PYTEST) -m '$(UNIT)' --cov --cov-report= || failed=1; \
	$(BIN)/python .ci/coverage_table.py; \
	$(PYTEST) -m 'not ($(UNIT))' || failed=1; exit $$failed
else
	$(PYTEST)
endif

quick: install ## The tests that start no service and no real model: less than two minutes on two free cores
	$(PYTEST) -m 'not slow and not model'

test-cluster: install ## Several hosts and Slurm on this machine: an hour. Needs root, iproute2, for Slurm also slurm-wlm and munge
	TENSORWEAVE_TEST_CLUSTER=1 $(BIN)/python -m pytest -rs tests/hosts

bench: install ## Throughput, latency and step overhead of the small model, as JSON in build/bench
	$(BIN)/tensorweave bench overhead --json build/bench/overhead.json
	$(BIN)/tensorweave bench latency --model smollm2 --dtype float32 --json build/bench/latency.json
	$(BIN)/tensorweave bench throughput --model smollm2 --dtype float32 --json build/bench/throughput.json

clean: ## Remove .venv and everything built (the model cache stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
