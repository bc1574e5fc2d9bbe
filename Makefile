# `make demo` and `make test` start from nothing: they set up a virtual environment and build the kernels first.
# `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= .benchmarks
ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One virtual environment, one pip at a time; and benchmarks want the machine to themselves.
.NOTPARALLEL:

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
LIBRARIES := accelerate segmentation-models-pytorch timm torchvision transformers
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)

.PHONY: help demo test bench lint format test-gpu bench-gpu clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  ARGS       for the command behind demo, test and bench: make test ARGS='-k conv -n 2'"
	@echo "  PYTHON     python3; the one that VENV is made from, and that test-gpu and bench-gpu run"
	@echo "  VENV       .venv"
	@echo "  OUTPUT     .benchmarks; the folder for the reports of test-gpu and bench-gpu"
	@echo "  PART       of bench-gpu: ops, training, inference, fusions or memory; all without it"
	@echo "  COMMIT     for bench-gpu's results, where the tree is no git checkout"

demo: $(STAMPS)/demo  ## set up, then time fused networks against eager and compiled ones on this machine
	@echo "==> resnet-fast bench $(ARGS)"
	@$(BIN)/resnet-fast bench $(ARGS)

test: $(STAMPS)/test  ## set up, then run the tests
	@echo "==> pytest $(ARGS)"
	@$(BIN)/python -m pytest $(ARGS)

bench: $(STAMPS)/test  ## set up, then run the benchmarks: a table, and JSON in .benchmarks
	@echo "==> pytest --benchmark $(ARGS)"
	@$(BIN)/python -m pytest --benchmark $(ARGS)

lint: $(STAMPS)/lint  ## ruff, mypy and clang-format; builds nothing
	@echo "==> ruff check"
	@$(BIN)/ruff check
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check
	@echo "==> mypy resnet_fast"
	@$(BIN)/mypy resnet_fast
	@echo "==> clang-format --dry-run: $(words $(CSRC)) files in csrc"
	@$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))

format: $(STAMPS)/lint  ## let ruff and clang-format put the code in order
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format
	@$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

# On a machine with a GPU: the Python and torch that are there, and no network.

test-gpu: gpu-build  ## build for the Python in use, then run the tests that need a GPU, and compute-sanitizer
	@echo "==> tests that need a GPU, then compute-sanitizer: $(OUTPUT)/test-gpu.log"
	@$(PYTHON) -m benchmarks.check_gpu --output $(OUTPUT) --seconds $(call left,460) $(if $(ARGS),-- $(ARGS))

bench-gpu: gpu-build  ## build for the Python in use, then measure on the GPU; PART=ops, training, inference, fusions or memory alone
	@$(PYTHON) -m benchmarks.suite --device cuda --output $(OUTPUT) --seconds $(call left,520) \
		$(if $(PART),--part $(PART)) $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

bench-check:  ## time a little with the Python in use, and compare with benchmarks/results; never fails
	@$(PYTHON) -m benchmarks.compare $(ARGS) || [ $$? = 2 ]

# Seconds of the target's whole time (the argument) that are left after the build.
left = $$(($(1) - ($$(date +%s) - $(START))))
START := $(shell date +%s)

.PHONY: gpu-build bench-check
gpu-build:
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch sees no CUDA device. Without one: make test, or python -m benchmarks.suite --device cpu --output DIR")'
	@echo "==> Building the kernels for $$($(PYTHON) -c 'import sys; print(sys.executable)')"
	@export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-$$($(PYTHON) -c $(CAPABILITY))}"; \
		RESNET_FAST_CUDA=$${RESNET_FAST_CUDA-1} $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	@mkdir -p $(OUTPUT)
	@$(PYTHON) -m resnet_fast info | tee $(OUTPUT)/info.txt

CAPABILITY := 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'

clean:  ## remove what was built and cached; the virtual environment stays
	rm -rf build dist *.egg-info resnet_fast/_C*.so .mypy_cache .pytest_cache .ruff_cache
	rm -f $(STAMPS)/demo $(STAMPS)/test
	find resnet_fast tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Set-up. A stamp is newer than all that its step read, so a second call does nothing.

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("resnet_fast needs Python 3.10: make PYTHON=...")'
	@[ -x $(BIN)/pip ] || echo "==> Creating the virtual environment $(VENV)"
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || \
		{ echo "venv failed; Debian and Ubuntu keep it in the package python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	@echo "==> Installing torch, the largest download: 0.2 GB for the CPU, a few with CUDA"
	@$(PIP) torch
	@touch $@

# The environment variables that decide what is built; changing one builds again.
BUILD_OPTIONS := $(RESNET_FAST_CUDA) $(TORCH_CUDA_ARCH_LIST) $(CUDA_HOME) $(CUDA_PATH) $(CXX) $(CXXFLAGS) $(LDFLAGS)
$(STAMPS)/options: FORCE | $(STAMPS)/venv
	@echo '$(BUILD_OPTIONS)' | cmp -s - $@ || echo '$(BUILD_OPTIONS)' > $@

$(STAMPS)/demo: EXTRA := bench
$(STAMPS)/test: EXTRA := test
$(STAMPS)/demo $(STAMPS)/test: setup.py pyproject.toml constraints.txt $(CSRC) $(dir $(CSRC)) $(STAMPS)/options \
		| $(STAMPS)/torch
	@echo "==> Building the kernels and installing resnet_fast[$(EXTRA)]: about a minute"
	@$(PIP) --quiet -e '.[$(EXTRA)]' $(if $(filter test,$(EXTRA)),$(LIBRARIES))
	@$(BIN)/resnet-fast info
	@touch $@

$(STAMPS)/lint: constraints.txt | $(STAMPS)/torch
	@echo "==> Installing ruff, mypy and clang-format"
	@$(PIP) --quiet clang-format mypy ruff
	@touch $@
