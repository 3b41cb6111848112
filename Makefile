# `make serve` and `make test` set up .venv themselves; a second time that takes a moment.
PY := .venv/bin/python
MODEL ?= smollm2-135m
ARGS ?=
PYTEST_ARGS ?=
# A process for each core; files of tests are divided among them, in the order of tests/conftest.py.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help serve test test-fast test-clients lint format venv clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

serve:  ## start a server: make serve MODEL=qwen3-0.6b ARGS="--topology 1P1D"
	@scripts/setup.sh serve
	@exec $(PY) -m miniserve serve $(MODEL) $(ARGS)

test: lint  ## ruff, mypy, import contracts, pytest: make test PYTEST_ARGS="-k tokenizer"
	@$(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast:  ## what tells most in a minute: no servers, no clusters, no lint
	@scripts/setup.sh test
	@$(PY) -m pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

test-clients:  ## openai, litellm, ... and coding agents (claude, codex, ...) against a real server
	@scripts/setup.sh test
	@scripts/setup-clients.sh
	@$(PY) -m pytest tests/clients $(PYTEST_ARGS)

lint:  ## ruff, mypy and the import contracts only
	@scripts/setup.sh test
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports --no-logo --no-cache

format:  ## let ruff mend what it can
	@scripts/setup.sh test
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

venv:  ## only create .venv with everything in it
	@scripts/setup.sh test

clean:  ## remove .venv and what tools leave behind (models stay in ~/.cache/miniserve)
	rm -rf .venv .venv-clients .venv-agents build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
