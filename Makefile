# `make help` lists what there is. Everything runs in .venv, which `make setup` makes.
.DEFAULT_GOAL := help
.PHONY: help setup lock audit demo ui check test test-browser test-slow test-corpora chaos lint bench clean
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED = 0
export MLFLOW_DISABLE_TELEMETRY = true
export DO_NOT_TRACK = true

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: .venv/.ready  ## System packages (if it may install them), .venv, pinned dependencies, this project.

.venv/.ready: cluster/setup.sh requirements.lock pyproject.toml setup.py $(wildcard resnet_dist/data/native/*.[ch] data_prep/native/*.[ch] data_prep/*/native/*.[ch])
	@bash cluster/setup.sh

COMPILE := $(BIN)/pip-compile --quiet --upgrade --allow-unsafe --generate-hashes --no-annotate --strip-extras --no-header \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host
lock:  ## Renew the pinned versions and their hashes: requirements.lock, and the MLflow server's.
	$(COMPILE) --extra dev --extra docs -o requirements.lock pyproject.toml
	$(COMPILE) --constraint requirements.lock -o cluster/mlflow/requirements.lock cluster/mlflow/requirements.in

audit: setup  ## Ask the vulnerability databases about every pinned dependency: needs the internet.
	@[ -x .venv-audit/bin/pip-audit ] || { python3 -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit==2.10.1; }
	.venv-audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict

demo: setup  ## The main job on real handwritten digits: convert, train on two workers, log to MLflow.
	$(BIN)/data-prep convert --source digits --output data/digits/train.beton
	$(BIN)/data-prep convert --source digits --output data/digits/val.beton
	$(BIN)/resnet-dist train resnet_dist/recipes/digits_resnet20.yaml --on cluster/profiles/laptop.yaml --name demo
	@echo "see it in the MLflow UI: make ui    train afresh: rm -r runs/demo, or another --name"

ui: setup  ## Open the MLflow UI of the laptop profile on http://127.0.0.1:5000.
	$(BIN)/mlflow server --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port 5000 --workers 1

PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadgroup
check: lint  ## Style, types, and the tests without Ray, servers and long processes: some 3 minutes on two cores.
	$(PYTEST) -m "not slow and not system"

test: setup  ## All tests that a change must pass: some 15 minutes on two cores.
	$(PYTEST) -m "not slow"

test-browser: setup  ## MLflow's pages in a real browser: needs Chromium (apt-get install chromium).
	$(BIN)/python -m pytest tests/browser

test-slow: setup  ## The long tests too.
	$(BIN)/python -m pytest

test-corpora: setup  ## Compare how all tools read the files of a folder: make test-corpora FOLDER=images
	$(BIN)/python -m resnet_dist.fuzz.corpus $(FOLDER)

ROUNDS ?= 20
chaos: setup  ## Runs on Ray nodes as network namespaces, a fault in each round (root, Linux): make chaos ROUNDS=20
	$(BIN)/python tests/integration/chaos/rounds.py --rounds $(ROUNDS) --folder /tmp/resnet-dist-chaos \
	  --report /tmp/resnet-dist-chaos/report.md

lint: setup  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

BETON ?= data/digits/train.beton
bench: setup  ## Our loader beside its peers: make bench BETON=data/imagenet/val.beton
	$(BIN)/resnet-dist bench loader $(BETON)

clean:  ## Remove data, runs and caches; .venv stays.
	rm -rf data runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
