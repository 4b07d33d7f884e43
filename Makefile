# Everything runs from .venv, which these targets make and keep. `make` alone lists them.

PYTHON ?= python3
# What to install as torch. An exact version, because a bare `torch` may pull gigabytes of CUDA libraries.
# TORCH=installed keeps the torch (>= 2.11) that $(PYTHON) already has: the way for GPU machines.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
# -qq: errors only; what a newcomer can do nothing about (a newer pip, an unused index) stays off the screen.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

.DEFAULT_GOAL := help
.PHONY: help setup demo chat test test-slow test-clients check lint format types bench sanitize clean

# Tests start many Pythons. Without bytecode on disk each compiles the package anew, 0.3 s of a core.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := $(BIN)/python -m pytest
# Two workers, a file at a time each; the longest files come first (tests/conftest.py).
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

help:  ## show this list
	@echo "llama_tp: tensor-parallel inference for Llama 3 checkpoints"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  TORCH=installed   use the torch >= 2.11 of \$$(PYTHON) (GPU machines) instead of $(TORCH)"
	@echo "  PYTHON=python3.12 make .venv from this Python (3.10 or newer)"

setup: $(VENV)/.test  ## make .venv with everything that tests need (1.4 GB on disk)

demo: $(VENV)/.core  ## stream verse from the demo model on two CPU ranks
	@PATH="$(CURDIR)/$(BIN):$$PATH" NPROC=2 launch/single_node.sh generate \
	    --ckpt_dir checkpoints/demo --prompt "ROMEO:" --echo --max_gen_len 300 --device cpu

chat: $(VENV)/.doors  ## talk with the demo model: server and terminal client together
	@PATH="$(CURDIR)/$(BIN):$$PATH" launch/chat.sh --ckpt_dir checkpoints/demo --device cpu --quiet -- --max_tokens 60

check: $(VENV)/.test  ## lint, types, house rules and the model's tests (about 1 minute on 2 cores)
	@$(MAKE) --no-print-directory -j 2 --output-sync=target lint check-tests

lint: format types  ## format, lint and types, without tests

format: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/mypy

.PHONY: check-tests
check-tests: $(VENV)/.test
	$(PYTEST) -q tests/test_architecture.py tests/arch tests/model

test: $(VENV)/.test  ## the tests that every change must pass (about 12 minutes on 2 cores)
	$(PYTEST) $(WORKERS)

test-slow: $(VENV)/.test  ## all tests but the 10-minute load: also many ranks, big files, every variant
	$(PYTEST) --slow --deselect 'tests/clients/test_load.py::test_500_streams_at_once[600-512-12582912]'

# Clients whose pins clash with ours have an environment each, made of tests/clients/NAME.txt.
FOREIGN := $(patsubst tests/clients/%.txt,$(VENV)/clients/%/.done,$(wildcard tests/clients/*.txt))

test-clients: $(VENV)/.clients $(FOREIGN)  ## openai, langchain, lm-eval, huggingface_hub, instructor, a browser ... and a 10-minute load
	$(PYTEST) --slow -s tests/clients tests/test_golden_sse.py tests/server/test_page.py

sanitize: $(VENV)/.test  ## run the tests of the C++ parts under ASan and UBSan, then under TSan (with libomp-dev, loops too)
	$(BIN)/python tests/scripts/sanitize.py address
	$(BIN)/python tests/scripts/sanitize.py thread

bench: $(VENV)/.core  ## what this machine could do at best, and what the demo model does (a minute)
	@for n in 1 2; do $(BIN)/python -m llama_tp.launch --nproc_per_node $$n bench latency --ckpt_dir checkpoints/demo \
	    --device cpu || exit 1; echo; done

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info

# Stamps, so that a second `make` costs nothing and a changed pyproject.toml installs again.
$(VENV)/.core: pyproject.toml Makefile $(wildcard llama_tp/native/*.cpp llama_tp/native/*.h)
	@echo "setup: $(VENV) with $(TORCH)" >&2
ifeq ($(TORCH),installed)
	@test -d $(VENV) || $(PYTHON) -m venv --system-site-packages $(VENV)
	@$(BIN)/python -c 'import torch; v = torch.__version__; print("setup: keeping torch", v); \
	    exit(tuple(map(int, v.split(".")[:2])) < (2, 11))' >&2 \
	    || { echo "setup: no torch >= 2.11 in $(VENV) - run 'make clean', then name the Python that has it:" \
	         "make setup TORCH=installed PYTHON=..." >&2; exit 1; }
else
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
endif
	@$(PIP) -e .
	@$(BIN)/python -m llama_tp.native.build
	@touch $@

$(VENV)/.doors: $(VENV)/.core
	@$(PIP) -e '.[serve,chat]'
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "setup: what the tests need" >&2
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/clients/%/.done: tests/clients/%.txt | $(VENV)/.core
	@echo "setup: $* in an environment of its own" >&2
	@test -d $(@D) || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install -qq -r $<
	@touch $@

$(VENV)/.clients: $(VENV)/.test
	@echo "setup: clients of others" >&2
	@$(PIP) -e '.[test,clients]'
	@touch $@
