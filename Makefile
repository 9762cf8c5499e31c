# `make run` and `make test` install all that they need. Requirements: Python 3.11 and make.
.DEFAULT_GOAL := help
.PHONY: help run test lint format types imports unit proofs peers client requirements sbom audit train doctor install install-dev clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= $(or $(COUNTERPART_PORT),8000)
CONFIG ?= training/configs/t1.toml

# Environments: one for the service, without torch, one for development, one for the generator of API clients, and
# one for the tools of the supply chain.
SERVE := .venv
DEV := .venv-dev
CLIENT := .venv-client
BIN := $(DEV)/bin
SUPPLY := .venv-supply
PIP := install --quiet --disable-pip-version-check --constraint constraints.txt
SHIPPED := $(shell find app models -type f -not -name '*.pyc')
# The files of the tests are shared among processes, one more than cores, because many tests wait. `make unit PARALLEL=`
# runs them one after the other, for example for a debugger.
PARALLEL ?= -n $(shell expr $$(nproc) + 1) --maxprocesses 5 --dist loadfile
URL := http://127.0.0.1:$(PORT)
TOKEN_HEADER := $(if $(COUNTERPART_TOKEN),-H "Authorization: Bearer $$COUNTERPART_TOKEN" )

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

run: $(SERVE)/.installed var/sample/scan.nii.gz ## Install the service and start it on a sample scan.
	@echo
	@echo "  Pages    $(URL)/"
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

# Programs that tests use as independent checks. A test is skipped if its program is missing.
PEERS := orthanc orthanc-dicomweb dcmtk dicom3tools dcm2niix chromium postgresql prometheus systemd

peers: ## Install the Debian programs that tests use as independent checks; needs root.
	@missing=$$(for name in $(PEERS); do dpkg-query -W -f '$${Status}' $$name 2>/dev/null | grep -q 'ok installed' || echo $$name; done); \
	if [ -z "$$missing" ]; then echo "All peers are installed."; \
	elif [ "$$(id -u)" -ne 0 ]; then echo "Missing:" $$missing"." "Run as root: make peers" >&2; exit 1; \
	else apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi

# The packages of the image, with the versions of constraints.txt and the hashes of the package index.
COMPILE = $(SUPPLY)/bin/uv pip compile --quiet --universal --python-version 3.11 --constraint constraints.txt \
	--generate-hashes --no-emit-index-url --no-annotate --no-header
requirements: $(SUPPLY)/.installed ## Write the hashed requirements of the image.
	echo hatchling | $(COMPILE) - --output-file deploy/requirements/build.txt
	$(COMPILE) pyproject.toml --extra cpu --extra otel --output-file deploy/requirements/cpu.txt
	$(COMPILE) pyproject.toml --extra gpu --extra otel --output-file deploy/requirements/gpu.txt

sbom: $(SUPPLY)/.installed ## Write dist/sbom.json (CycloneDX) and dist/licences.md of the image; fails on the GPL.
	@mkdir -p dist
	@rm -rf $(SUPPLY)/image && $(PYTHON) -m venv --without-pip $(SUPPLY)/image
	$(SUPPLY)/bin/pip --quiet --python $(SUPPLY)/image/bin/python install --require-hashes --requirement deploy/requirements/cpu.txt
	$(SUPPLY)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
		--output-file dist/sbom.json $(SUPPLY)/image/bin/python
	$(SUPPLY)/bin/python deploy/licences.py dist/sbom.json > dist/licences.md

audit: $(SUPPLY)/.installed ## Look for known vulnerabilities in the packages of the image; needs the internet.
	@for name in cpu gpu; do \
	  $(SUPPLY)/bin/pip-audit --strict --disable-pip --require-hashes --requirement deploy/requirements/$$name.txt >$(SUPPLY)/audit 2>&1; \
	  status=$$?; \
	  if grep -qE 'could not be audited|ConnectionError|ServiceError' $(SUPPLY)/audit; then \
	    echo "Not audited: the database of pip-audit does not answer. Run make audit on a machine that reaches it." >&2; exit 2; fi; \
	  cat $(SUPPLY)/audit; test $$status -eq 0 || exit 1; \
	done

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

$(SUPPLY)/.installed: Makefile
	@$(PYTHON) -m venv $(SUPPLY)
	@$(SUPPLY)/bin/python -m pip install --quiet --disable-pip-version-check "cyclonedx-bom>=7,<8" "pip-audit>=2.7,<3" "uv>=0.7"
	@touch $@

var/sample/scan.nii.gz: | $(SERVE)/.installed
	@$(SERVE)/bin/counterpart sample -o var/sample > /dev/null

clean: ## Remove the environments, the caches and the sample, but no trained run and no store.
	rm -rf $(SERVE) $(DEV) $(CLIENT) $(SUPPLY) var dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
