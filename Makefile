# Everything a fresh machine needs: Python 3.11+ with pip. `make setup` is a no-op while the lock and pyproject.toml stand still.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
UV     := $(shell command -v uv 2>/dev/null)

.PHONY: setup quickstart test lint format bench bench-gpu lock clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pcam-automl needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(UV),)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
else
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
endif
	@touch $@

quickstart: setup
	$(BIN)/pcam-automl quickstart

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks

# PCAM_BENCH_DEVICE=cuda:1 make bench-gpu takes another one.
bench-gpu: setup
	PCAM_BENCH_DEVICE=$${PCAM_BENCH_DEVICE:-cuda:0} $(BIN)/python -m benchmarks batches training inference overhead workers

# Pins for Python 3.11-3.13 on every platform; no index address is written into the file. The extra `benchmark` is left out:
# half a gigabyte that one benchmark needs.
lock: setup
	$(or $(UV),$(BIN)/uv) pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --extra dev --extra postgres --extra mysql --custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
