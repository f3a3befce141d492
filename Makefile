# melfold: `make` lists what there is. A fresh machine needs Python 3.11 to 3.13 and make, nothing else.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint soak bench gpu browser clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(READY)  ## install everything into .venv, from requirements.txt

$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "melfold needs Python 3.11, 3.12 or 3.13; found: $$(python3 --version 2>&1)"; exit 2; }
	@echo "Setting up .venv with $$($(PYTHON) --version): PyTorch and the rest, a few minutes the first time ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "Installing melfold itself ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "Ready: $(BIN)/melfold --help"

demo: setup  ## the whole job on a synthetic competition, shipped to a local stand-in for Kaggle: a few minutes
	$(BIN)/melfold demo
	MELFOLD_HOME=build/demo MELFOLD_PACE=0.2 $(BIN)/python -m tests.fake_kaggle --root build/demo/kaggle \
		--data build/demo/data/demo --truth build/demo/data/demo/test_post_competition.csv --competition demo \
		-- $(BIN)/melfold ship demo --cpu --competition demo

test: setup lint  ## lint and tests
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

lint: setup  ## ruff, import order, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: setup  ## long trials
	$(BIN)/python -m pytest -m soak
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m tests.soak.chaos --seed 0 --kills 200 --damages 100

browser:  ## install Chromium for the tests of reports, where apt-get is there; without it they are skipped
	@command -v chromedriver >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } \
		>/dev/null 2>&1 || echo "No Chromium could be installed: the tests of reports in a browser will be skipped."

bench: setup  ## speed, as ratios within one run
	$(BIN)/python -m tests.bench

gpu: setup  ## what only a GPU can show: placement, repeatability, speed, memory; a few minutes
	$(BIN)/python -m tests.bench.gpu

clean:  ## remove the environment and build/; data, caches, runs, folds and submissions stay
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
