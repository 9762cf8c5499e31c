# `make run` and `make test` install all that they need. Requirements: Python 3.11 and make.
.DEFAULT_GOAL := help
.PHONY: help run test lint format types imports unit proofs peers client train doctor install install-dev clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= $(or $(COUNTERPART_PORT),8000)
CONFIG ?= training/configs/t1.toml

# Environments: one for the service, without torch, one for development, and one for the generator of API clients.
SERVE := .venv
DEV := .venv-dev
CLIENT := .venv-client
BIN := $(DEV)/bin
PIP := install --quiet --disable-pip-version-check --constraint constraints.txt
SHIPPED := $(shell find app models -type f -not -name '*.pyc')
# The files of the tests are shared among processes. PARALLEL= runs them one after the other, for example for a debugger.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile
URL := http://127.0.0.1:$(PORT)
TOKEN_HEADER := $(if $(COUNTERPART_TOKEN),-H "Authorization: Bearer $$COUNTERPART_TOKEN" )

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

run: $(SERVE)/.installed var/sample/scan.nii.gz ## Install the service and start it on a sample scan.
	@echo
	@echo "  API      $(URL)/docs"
	@echo "  Analyse  curl -sS $(TOKEN_HEADER)-H 'Prefer: wait=60' -F file=@$(CURDIR)/var/sample/scan.nii.gz $(URL)/v1/scans"
	@echo "  Or       $(SERVE)/bin/counterpart detect var/sample/scan.nii.gz -o var/sample/result"
	@echo "  Stop     Ctrl-C"
	@echo
	@exec $(SERVE)/bin/counterpart serve --port $(PORT)

doctor: $(SERVE)/.installed ## Check the installation.
	@$(SERVE)/bin/counterpart doctor

test: lint types imports unit ## Run lint, types, imports and unit, as CI does.

lint: $(DEV)/.installed ## Check the style with ruff.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)/.installed ## Check the types with mypy.
	$(BIN)/mypy

imports: $(DEV)/.installed ## Check the import rules of docs/architecture.md.
	$(BIN)/lint-imports

unit: $(DEV)/.installed ## Run the tests; ARGS is passed to pytest.
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

proofs: $(DEV)/.installed ## Run the slow tests: killed processes, a cluster, the API contract (some minutes).
	$(BIN)/python -m pytest -m proof tests/proofs tests/jobs

# Generator of API clients. Its dependencies contradict those of the development environment.
$(CLIENT)/.installed: tests/support/openapi_client_constraints.txt
	@test -x $(CLIENT)/bin/python || $(PYTHON) -m venv $(CLIENT)
	@$(CLIENT)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< openapi-python-client
	@touch $@

client: $(CLIENT)/.installed ## Install the generator of API clients that a test uses.

# Programs that judge the results. A test is skipped if its program is missing.
PEERS := orthanc orthanc-dicomweb dcmtk dicom3tools dcm2niix chromium postgresql

peers: ## Install the Debian packages that tests use as independent judges; needs root.
	@missing=$$(for name in $(PEERS); do dpkg-query -W -f '$${Status}' $$name 2>/dev/null | grep -q 'ok installed' || echo $$name; done); \
	if [ -z "$$missing" ]; then echo "All peers are installed."; \
	elif [ "$$(id -u)" -ne 0 ]; then echo "Missing:" $$missing"." "Run as root: make peers" >&2; exit 1; \
	else apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi

format: $(DEV)/.installed ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(DEV)/.installed ## Train a bundle; CONFIG=training/configs/t1.toml by default.
	$(BIN)/python -m training.run $(CONFIG)

install: $(SERVE)/.installed ## Install the service.
install-dev: $(DEV)/.installed ## Install the development environment.

# Not editable, so that it is the package that a user gets, with the bundles inside.
$(SERVE)/.installed: pyproject.toml constraints.txt $(SHIPPED)
	@echo "Installing the service into $(SERVE). The first time, this takes one or two minutes."
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is required: make PYTHON=/path/to/python3.11")'
	@test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/python -m pip $(PIP) ".[cpu,sample]"
	@touch $@

$(DEV)/.installed: pyproject.toml constraints.txt
	@echo "Installing the development environment into $(DEV). The first time, this takes some minutes."
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is required: make PYTHON=/path/to/python3.11")'
	@test -x $(DEV)/bin/python || $(PYTHON) -m venv $(DEV)
	@$(DEV)/bin/python -m pip $(PIP) --editable ".[cpu,sample,training,dev]"
	@touch $@

var/sample/scan.nii.gz: | $(SERVE)/.installed
	@$(SERVE)/bin/counterpart sample -o var/sample > /dev/null

clean: ## Remove the environments, the caches and the sample, but no trained run and no store.
	rm -rf $(SERVE) $(DEV) $(CLIENT) var dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
