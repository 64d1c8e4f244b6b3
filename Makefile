# `make demo` and `make test` set up all they need in .venv; nothing else on the machine is touched.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-engines test-versions lint docs figures bench-cpu fuzz clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,cuda,report,docs,dev]' triton
	touch $@

demo: $(READY)
	$(BIN)/moealign demo

# ARGS="--order 1" runs them in a random order.
test: $(READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

# The drop-ins inside the real vLLM and SGLang: fetches the Python files of their wheels.
test-engines: $(READY)
	$(BIN)/python tests/engines/run_engines.py

# The tests under other releases of torch, Transformers, Triton and Python, each in an environment of its own under .versions.
test-versions:
	$(PYTHON) tests/commands/versions.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Every table, drawing and figure of the README and docs/, from the tracked measurements.
figures: $(READY)
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python docs/draw.py

bench-cpu: $(READY)
	$(BIN)/python benchmarks/align_cpu.py

fuzz: $(READY)
	$(BIN)/python tests/commands/fuzz.py --cases 100000

clean:
	rm -rf $(VENV) .versions build dist site .pytest_cache .mypy_cache .ruff_cache
