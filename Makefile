# The two commands a new user needs: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --editable

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nasfx needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.created
	$(INSTALL) '.[mnn,latency]'
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.created
	$(INSTALL) '.[mnn,latency,dev]'
	touch $@ $(VENV)/.run

quickstart: $(VENV)/.run  ## search, finalize, export and measure a small net on real digits
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev  ## the test suite without the slow tests
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.dev  ## the slow tests alone
	$(BIN)/python -m pytest -m slow -n 2

lint: $(VENV)/.dev  ## formatting, linting, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	# passes/ is nasfx.passes only once installed: types and layers are checked beside a built copy.
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/lint .
	$(BIN)/pyright --pythonpath $(BIN)/python
	cd build/lint && ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

format: $(VENV)/.dev  ## apply formatting and the linter's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# NNI=PYTHON adds NNI 3.0, installed in an environment of its own: see benchmarks/README.md.
bench: $(VENV)/.dev  ## the benchmarks, for hours: tables, and JSON in bench-output/
	$(BIN)/python benchmarks/transform.py --output bench-output
	$(BIN)/python benchmarks/supernet.py --output bench-output
	$(BIN)/python benchmarks/supernet.py --threads 2 --rounds 2 --memory 0 --output bench-output
	$(BIN)/python benchmarks/sampled.py --output bench-output
	$(BIN)/python benchmarks/strategies.py --memory 2 --output bench-output $(if $(NNI),--nni $(NNI))
	$(BIN)/python benchmarks/strategies.py --threads 2 --rounds 2 --output bench-output \
		--strategies single-path enas proxyless-two darts $(if $(NNI),--nni $(NNI))
	$(BIN)/python benchmarks/evolution.py --output bench-output
	$(BIN)/python benchmarks/precision.py --output bench-output
	$(BIN)/python benchmarks/latency.py --output bench-output

clean:  ## remove the virtual environment and what the examples wrote
	rm -rf $(VENV) *-output
