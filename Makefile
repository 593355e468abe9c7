# Every verb a developer types. `make env` builds .venv from pinned versions; nothing else is assumed installed.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: env demo test lint fmt fuzz gpu clean

env: $(VENV)/.ready

# torch first and by itself: a CPU build may lie where pip finds it, and nothing may pull another.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'from actors.kernels.dispatch import host_kernels; print("codecs:", host_kernels().name)'
	$(BIN)/python -m orchestrator.warm
	touch $@

demo: env
	$(BIN)/isthmus demo

test: env lint
	$(BIN)/python -m pytest tests

# Everything that parses bytes from a peer, guided by coverage; what it finds lies in build/fuzz/*/findings.
FUZZ_SECONDS ?= 600
fuzz: env
	nice -n 10 $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

# On a machine with a CUDA device, torch, cuda-core and pytest; Ray and the other test packages are not needed.
gpu:
	$(PYTHON) -m pytest --noconftest -o addopts= -rs tests/gpu
	$(PYTHON) -m bench.gpu --check

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=. $(BIN)/lint-imports

fmt: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
