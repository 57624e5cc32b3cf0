# Everything runs in .venv, which every target makes when it is missing or older than its inputs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
PEERS := .venv-peers
# Processes of the whole test suite, each on files of its own; each holds torch and DALI, 1.5 GB.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
UV := 0.13.9
# What `make gpu` leaves behind, and the Python that it runs: .venv's, or where there is none the machine's.
OUT ?= gpu-results
GPU_PYTHON = env PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help setup demo test check static format bench bench-peers gpu readme ffcv lock clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## the virtual environment in .venv (every other target does this by itself)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "linerate needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing; bring it with: apt-get install python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"; exit 2; }
	@echo "setting up .venv (half a minute to some minutes, by your network) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP) ## photos to report.html in minutes; DEMO="--images DIR" for your own
	@$(BIN)/linerate demo $(DEMO)

test: $(STAMP) ## the tests, several files at once (JOBS=0: one after the other; PYTEST="-k name": some of them)
	@$(BIN)/python -m pytest -q $(or $(PYTEST),-n $(JOBS) --dist loadfile)

check: static test ## all that CI runs: format, lint, types, import direction, tests

static: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## rewrite the files as ruff wants them
	@$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format .

bench: $(STAMP) ## the benchmarks that this machine can run, as a table and JSON lines
	@$(BIN)/linerate bench run $(BENCH)

bench-peers: $(PEERS)/.ready ## img2dataset, lightly, litdata and mosaicml-streaming for `make bench`, in .venv-peers (7 GB)
	@$(BIN)/linerate bench list

$(PEERS)/.ready: bench/peers.txt | $(STAMP)
	@echo "setting up $(PEERS) (half a minute to some minutes, by your network) ..."
	@test -x $(PEERS)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(PEERS)
	@$(BIN)/uv pip sync --quiet --python $(PEERS)/bin/python bench/peers.txt
	@touch $@

gpu: ## on a machine with a CUDA device, offline: its tests and benchmarks, 9 minutes at most; results in OUT
	@mkdir -p $(OUT)
	@$(GPU_PYTHON) -c 'import torch, torchvision, timm, tyro, rich, pyarrow, xxhash, pytest' || \
	  { echo "make gpu needs what docs/gpu.md lists; bring the wheel of what is missing"; exit 2; }
	-@timeout 140 $(GPU_PYTHON) -m pytest -q -rsfE -m gpu -W default -p no:cacheprovider \
	  $$(grep -rlE 'needs_gpu\(|mark\.gpu' tests --include='test_*.py') 2>&1 | tee $(OUT)/tests.txt
	@$(GPU_PYTHON) -m linerate bench run --suite gpu --within-s 370 --out $(OUT)/results.jsonl

readme: $(STAMP) ## README's table of results and its tree anew
	@$(BIN)/python -m linerate.bench.readme

ffcv: $(STAMP) ## the ffcv extra, which compiles against OpenCV and libturbojpeg
	@pkg-config --exists opencv4 libturbojpeg || \
	  { echo "ffcv needs headers; bring them with: apt-get install libturbojpeg0-dev libopencv-dev pkg-config g++ python3-dev"; exit 2; }
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.txt ffcv==1.0.2

LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate
lock: $(STAMP) ## requirements.txt and bench/peers.txt anew, for Python 3.11 to 3.13
	@$(LOCK) --extra dev --extra s3 --extra ray --output-file requirements.txt pyproject.toml
	@grep -E '^(pillow|rich|timm|torch|torchvision)==' requirements.txt | \
	  $(LOCK) --constraint - --output-file bench/peers.txt bench/peers.in

clean: ## remove what make and the tools made, .venv included
	@rm -rf .venv $(PEERS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/linerate.egg-info demo gpu-results
	@find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
