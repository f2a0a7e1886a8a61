# One recipe per verb; every recipe does the set-up it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode halves every start; some environments turn it off.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONWARNINGS ?= default
export LITELLM_LOCAL_MODEL_COST_MAP := True
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench soak lab ui lock clean setup setup-dev peers lake

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

demo: setup ## the main job, end to end: four versions, refused, promoted, refused, rolled back (2 to 4 minutes)
	@$(BIN)/python -m agentkit_pipelines.demo

test: setup-dev lake ## run the tests, a file on each core
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(TEST_ARGS)

lint: setup-dev ## ruff, mypy, import contracts, notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/marimo check --strict notebooks/*.py

bench: setup-dev peers lake ## speed and model quality as ratios in one run; DATA=folder adds public data sets
	@$(BIN)/python tests/benchmarks/bench.py $(if $(DATA),--data $(DATA))

soak: setup-dev lake ## the long forms of the kill and simulation tests
	@AGENTKIT_SOAK=1 $(BIN)/python -m pytest --timeout=7200 $(TEST_ARGS)

lab: setup-dev ## JupyterLab on notebooks/
	@$(BIN)/jupyter lab --notebook-dir notebooks

ui: setup ## the MLflow UI on http://127.0.0.1:5000
	@$(BIN)/agentkit ui

setup: $(VENV)/.ready ## virtual environment with what a batch worker needs
setup-dev: $(VENV)/.ready-dev ## and with JupyterLab and the development tools

# uv installs the same lock several times faster than pip; where it cannot reach the index, pip does it.
define install
	@echo "agentkit: installing $(1) into $(VENV) (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit("agentkit needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv==0.13.8 || true
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --require-hashes -r $(1) --compile-bytecode 2>$(VENV)/uv.log \
	  || $(BIN)/python -m pip install -q --no-deps --require-hashes -r $(1)
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e . 2>>$(VENV)/uv.log \
	  || $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@$(BIN)/python -m compileall -q agentkit tracking pipelines
endef

$(VENV)/.ready: requirements.lock pyproject.toml
	$(call install,requirements.lock)
	@touch $@

$(VENV)/.ready-dev: requirements-dev.lock requirements.lock pyproject.toml
	$(call install,requirements-dev.lock)
	@touch $(VENV)/.ready $@

# Frameworks to compare with, in an environment of their own: in ours, what litellm asks for holds them back. Where they
# cannot be installed, the benchmark says so.
peers: $(VENV)/peers/.ready
$(VENV)/peers/.ready: requirements-bench.lock | setup-dev
	@echo "agentkit: installing $< into $(VENV)/peers"
	@test -x $(VENV)/peers/bin/python || $(BIN)/python -m venv $(VENV)/peers
	@{ $(BIN)/uv pip install -q --python $(VENV)/peers/bin/python --require-hashes -r $< --compile-bytecode 2>$(VENV)/uv.log \
	  || $(VENV)/peers/bin/python -m pip install -q --require-hashes -r $<; } && touch $@ || true

# DuckDB of the version that has extensions for a lake, and object storage to test with, over the packages of ours. Where it cannot
# be installed, tests say so.
lake: $(VENV)/lake/.ready
$(VENV)/lake/.ready: requirements-lake.lock | setup-dev
	@echo "agentkit: installing $< into $(VENV)/lake"
	@test -x $(VENV)/lake/bin/python || $(BIN)/python -m venv --without-pip $(VENV)/lake
	@$(BIN)/python -c 'import site, pathlib, sys; ours, theirs = site.getsitepackages()[0], next(pathlib.Path("$(VENV)/lake").glob("lib/*/site-packages")); (theirs / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})")'
	@{ $(BIN)/uv pip install -q --python $(VENV)/lake/bin/python --no-deps --require-hashes -r $< 2>$(VENV)/uv.log \
	  || $(BIN)/python -m pip --python $(VENV)/lake/bin/python install -q --no-deps --require-hashes -r $<; } && touch $@ || true

lock: ## renew the lock files (names, versions, hashes; no index)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --extra build pyproject.toml -o requirements.lock
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --all-extras pyproject.toml -c requirements.lock -o requirements-dev.lock
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate tests/benchmarks/peers.in -o requirements-bench.lock
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-deps tests/lake.in -o requirements-lake.lock

clean: ## remove the virtual environment and all local runs
	rm -rf $(VENV) .agentkit
