# Everything a fresh machine needs: python3 with venv, make, and a package registry.

PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 2
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types unit chaos format bench clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Create the environment (.venv) with the tested set of packages

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install ## Draw scenes, label them, score and show the result: offline, about a minute
	$(BIN)/ovss-ray demo

test: lint types unit ## Lint, types and the whole test suite

lint: install ## Style: ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## Types: mypy, strict
	$(BIN)/mypy

unit: install ## The test suite
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile

chaos: install ## Kill workers, driver and requests at random over 2,400 images; the suite has a short form
	OVSS_CHAOS_IMAGES=2400 $(BIN)/pytest tests/run/test_chaos.py --log-cli-level=INFO
	OVSS_KILLS=10 $(BIN)/pytest tests/run/test_interruption.py -k killed

format: install ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Measure, and print ratios (see benchmarks/)
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/scale.py --images 500000 --shards 1020 --driver-shards 1000 --rounds 1

clean: ## Remove the environment and what the demo wrote
	rm -rf $(VENV) demo-run build dist *.egg-info
