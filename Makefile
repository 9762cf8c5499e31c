# `make run` and `make test` do all the set-up on a machine with Python 3.11 and make.
.DEFAULT_GOAL := help
.PHONY: help run test lint format types imports unit proofs train doctor install install-dev clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= $(or $(COUNTERPART_PORT),8000)
CONFIG ?= training/configs/t1.toml

# Two environments: the service's has no torch, the developer's has everything.
SERVE := .venv
DEV := .venv-dev
BIN := $(DEV)/bin
PIP := install --quiet --disable-pip-version-check --constraint constraints.txt
SHIPPED := $(shell find app models -type f -not -name '*.pyc')
URL := http://127.0.0.1:$(PORT)
TOKEN_HEADER := $(if $(COUNTERPART_TOKEN),-H "Authorization: Bearer $$COUNTERPART_TOKEN" )

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

run: $(SERVE)/.installed var/sample/scan.nii.gz ## Install the service, start it, say what to open.
	@echo
	@echo "  Open     $(URL)/docs"
	@echo "  Try      curl -sS $(TOKEN_HEADER)-H 'Prefer: wait=60' -F file=@$(CURDIR)/var/sample/scan.nii.gz $(URL)/v1/scans"
	@echo "  Or       $(SERVE)/bin/counterpart detect var/sample/scan.nii.gz -o var/sample/result"
	@echo "  Stop     Ctrl-C"
	@echo
	@exec $(SERVE)/bin/counterpart serve --port $(PORT)

doctor: $(SERVE)/.installed ## Check the installation.
	@$(SERVE)/bin/counterpart doctor

test: lint types imports unit ## Lint, types, import rules and tests: what CI runs.

lint: $(DEV)/.installed ## Style, as ruff sees it.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)/.installed ## mypy, strict.
	$(BIN)/mypy

imports: $(DEV)/.installed ## The import rules of docs/architecture.md.
	$(BIN)/lint-imports

unit: $(DEV)/.installed ## Tests alone; ARGS goes to pytest.
	$(BIN)/python -m pytest $(ARGS)

proofs: $(DEV)/.installed ## Kill -9, a cluster, the contract, in their short form: some minutes.
	$(BIN)/python -m pytest -m proof tests/proofs tests/jobs

format: $(DEV)/.installed ## Rewrite the code as `make lint` wants it.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(DEV)/.installed ## Train a bundle from its data: CONFIG=training/configs/t1.toml
	$(BIN)/python -m training.run $(CONFIG)

install: $(SERVE)/.installed ## The service's environment.
install-dev: $(DEV)/.installed ## The developer's environment.

# Not editable: what a user gets, with the bundles inside the package.
$(SERVE)/.installed: pyproject.toml constraints.txt $(SHIPPED)
	@echo "Installing the service into $(SERVE): a minute or two, the first time."
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/python -m pip $(PIP) ".[cpu,sample]"
	@touch $@

$(DEV)/.installed: pyproject.toml constraints.txt
	@echo "Installing the developer's environment into $(DEV): some minutes, the first time."
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@test -x $(DEV)/bin/python || $(PYTHON) -m venv $(DEV)
	@$(DEV)/bin/python -m pip $(PIP) --editable ".[cpu,sample,training,dev]"
	@touch $@

var/sample/scan.nii.gz: | $(SERVE)/.installed
	@$(SERVE)/bin/counterpart sample -o var/sample > /dev/null

clean: ## Remove both environments, caches and the sample; never a trained run or a store.
	rm -rf $(SERVE) $(DEV) var dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
