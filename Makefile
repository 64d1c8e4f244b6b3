# Targets set up what they need in .venv and change nothing else on the machine.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-targets test-engines test-versions lint docs figures dist bench-cpu fuzz clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,cuda,report,docs,dev]' triton
	touch $@

demo: $(READY)
	$(BIN)/moealign demo

# ARGS="--order 1" shuffles the tests.
test: $(READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

# Compile every configuration of the kernels for every architecture; `make test` compiles a part of them for one.
test-targets: $(READY)
	MOEALIGN_TARGETS=all $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m targets

# Run the drop-ins inside the real vLLM and SGLang; downloads the Python files of their wheels.
test-engines: $(READY)
	$(BIN)/python tests/engines/run_engines.py

# Run the tests under other releases of torch, Transformers, Triton and Python, in environments under .versions.
test-versions:
	$(PYTHON) tests/commands/versions.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Rebuild every table, drawing and figure of the documentation from the tracked measurements.
figures: $(READY)
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python docs/draw.py

# Build the sdist, the wheel from that sdist, and check both.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/commands/package.py dist

bench-cpu: $(READY)
	$(BIN)/python benchmarks/align_cpu.py

fuzz: $(READY)
	$(BIN)/python tests/commands/fuzz.py --cases 100000

clean:
	rm -rf $(VENV) .versions build dist site .pytest_cache .mypy_cache .ruff_cache
