# Two commands do everything on a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
FUZZ_CASES ?= 5000
FUZZ_SEED ?= 1
SECONDS ?= 3600
CHAOS_ARGS ?= --moments 12 --failures 8

.PHONY: help install quickstart quickstart-train test test-fast test-gpu test-vllm lint check fuzz fuzz-coverage fuzz-serve load-serve chaos docs docs-reference format clean

help:
	@echo "make quickstart        a trained checkpoint against its base model, and a picture of its routing (one to two minutes on two cores)"
	@echo "make quickstart-train  train adapters and gates, and compare (about ten minutes on two cores)"
	@echo "make test              all tests, the real end-to-end run included"
	@echo "make test-fast         only the fast tests"
	@echo "make test-gpu          what only a CUDA GPU can show, every file in a process for itself"
	@echo "make test-vllm         the plugin in vLLM itself, on a CPU, in an environment of its own (3 GB, made once in the cache)"
	@echo "make lint              ruff and mypy"
	@echo "make check             ruff, mypy and all tests"
	@echo "make docs              the documentation as a site in site/, with strict links"
	@echo "make docs-reference    the pages of the command line and of the settings, from the code"
	@echo "make fuzz              FUZZ_CASES=5000 malformed inputs through the command line"
	@echo "make fuzz-coverage     the readers under a coverage-guided fuzzer for SECONDS=3600"
	@echo "make fuzz-serve        10,000 requests that schemathesis makes from the server's own description"
	@echo "make load-serve        clients that vanish, read slowly, send nonsense or come in bursts, against the server for SECONDS=3600"
	@echo "make chaos             kills and failing writes at every step of the commands that write"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/meteora quickstart

quickstart-train: $(VENV)/.installed
	$(BIN)/meteora quickstart --train

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-dev
	PYTHONPATH=tests $(BIN)/python -m support.gpu_run

test-vllm: $(VENV)/.installed-dev
	VLLM_TEST_PYTHON="$$(.ci/vllm $(BIN)/python .)" $(BIN)/python -m pytest -n 0 tests/core/integrations/vllm_plugin

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.robustness --seed $(FUZZ_SEED) --cases $(FUZZ_CASES)

fuzz-coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,fuzz]"
	$(BIN)/python -m tests.robustness.guided --seconds $(SECONDS)

fuzz-serve: $(VENV)/.installed-dev
	SERVE_FUZZ_REQUESTS=1000 $(BIN)/python -m pytest -n 0 -s --timeout 0 tests/core/serving/test_openapi.py

load-serve: $(VENV)/.installed-dev
	$(BIN)/python -m tests.robustness.load --seconds $(SECONDS)

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.robustness --chaos $(CHAOS_ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

docs-reference: $(VENV)/.installed
	$(BIN)/python -m docs.tools.reference_pages

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info
