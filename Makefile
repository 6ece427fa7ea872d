# Two commands do everything on a fresh machine: make demo, make test. Each makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For the CPU build, several gigabytes smaller than the one with CUDA, point pip at PyTorch's CPU index before `make`.
TORCH ?= torch==2.13.0

.PHONY: help venv demo test lint bench faults soak clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

venv: $(VENV)/.ready  ## the virtual environment with everything in it

# torch first and pinned, so that nothing else pulls another build in.
$(VENV)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: venv  ## broker, server and board on this machine, on real photos; writes demo.html
	$(BIN)/aiflow demo

test: venv  ## every test; those that need a broker are skipped where mosquitto is not installed
	$(BIN)/python -m pytest -q

lint: venv  ## ruff, mypy strict, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv  ## codec, device, server and gateway, as ratios
	for what in codec device server gateway; do $(BIN)/aiflow bench $$what; done

faults: venv  ## the fault matrix: what becomes of every request (docs/RELIABILITY.md)
	$(BIN)/aiflow bench faults

soak: venv  ## ten minutes at three times the load a server can take: queues and memory
	$(BIN)/aiflow bench faults --row soak --seconds 600

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
