# Every target but help and clean sets the project up first; if nothing has changed, that costs a tenth of a second.

PYTHON := $(or $(PYTHON),$(shell command -v python3.11 || command -v python3))
BIN := $(CURDIR)/.venv/bin

# DeepSpeed's CPU op is built once, by the set-up, and kept here.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
# torch calls `ninja` by name when it loads that op.
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart smoke serve test check lock docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'ARGS="key=value ..." overrides recipe keys; UDRL_EXTRA=gpu installs the CUDA build of vLLM'

setup: ## check the machine, make .venv, install, convert the bundled teacher, build DeepSpeed's op
	@test -n "$(PYTHON)" || { echo "setup: no python3 found: install python3.11, python3.11-venv and python3.11-dev" >&2; exit 2; }
	@"$(PYTHON)" scripts/install.py

quickstart: setup ## generate, train and evaluate on recipes/quickstart.yaml
	@"$(BIN)/python" -m jobs.pipeline recipes/quickstart.yaml $(ARGS)

smoke: setup ## the same on recipes/smoke.yaml, in minutes
	@"$(BIN)/python" -m jobs.pipeline recipes/smoke.yaml $(ARGS)

serve: setup ## serve quickstart's student: playground and API on loopback
	@"$(BIN)/python" -m serve.app recipes/quickstart.yaml $(ARGS)

test: setup ## all tests, the quick ones first and in two processes; ARGS="tests/unit/test_claim.py -x" selects
ifeq ($(ARGS),)
	@"$(BIN)/python" -m pytest -n 2 --dist loadfile tests/unit
	@"$(BIN)/python" -m pytest tests/integration tests/e2e
else
	@"$(BIN)/python" -m pytest $(ARGS)
endif

check: setup ## format, lint, types, import direction
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/ruff" check .
	@"$(BIN)/mypy"
	@"$(BIN)/lint-imports"

lock: setup ## resolve pyproject.toml into requirements/*.txt; ARGS="--upgrade" takes newer versions
	@scripts/lock.sh $(ARGS)

docs: setup ## write docs/recipe.md from udrl/recipe.py
	@"$(BIN)/python" -m scripts.recipe_reference

format: setup ## format the code and mend what the linter can
	@"$(BIN)/ruff" format .
	@"$(BIN)/ruff" check --fix .

clean: ## remove .venv and all caches; runs/ stays
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
