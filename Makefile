# Needs: make, Python 3.11 or 3.12, pip. Everything else is installed into VENV at the versions of constraints.txt.
#   make serve PORT=31000 ARGS="--stride 8"       make test ARGS="tests/isd -k noise"       make bench ARGS=--quick       VENV=/path/to/an/environment

# The pinned packages have wheels for these versions (outlines_core has none for 3.13).
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do "$$p" -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 30000
MODEL ?=
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.idlm-installed

.DEFAULT_GOAL := help
.PHONY: help install serve check test deploy-check gpu-check soak bench clean

help: ## list the targets
	@echo "make TARGET [PORT=$(PORT)] [HOST=$(HOST)] [MODEL=checkpoint] [ARGS=...] [VENV=$(VENV)] [PYTHON=python3]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

install: $(STAMP) ## create the environment (about 11 GB, 3 minutes), or reuse it

serve: $(STAMP) ## serve the embedded checkpoint (or MODEL) on PORT
	@exec "$(BIN)/idlm" serve $(if $(MODEL),"$(MODEL)") --host "$(HOST)" --port "$(PORT)" $(ARGS)

check: $(STAMP) ## say whether this environment can serve
	@exec "$(BIN)/idlm" check --host "$(HOST)" --port "$(PORT)"

test: $(STAMP) ## run the tests
	@exec "$(BIN)/python" -m pytest $(ARGS)

deploy-check: $(STAMP) ## check deploy/ with every tool: prometheus, kubectl, docker compose, unshare, jq (minutes)
	@IDLM_DEPLOY_CHECK=1 exec "$(BIN)/python" -m pytest tests/deploy $(ARGS)

gpu-check: $(STAMP) ## on a machine with a GPU: what only one can show, into gpu-check/table.md (ARGS="--only answers"; up to two hours)
	@exec "$(BIN)/python" -m tests.gpu_check $(ARGS)

soak: $(STAMP) ## 20,000 requests under fire, killed processes, hostile requests, a router (about an hour and a half; SOAK_REQUESTS=500 for a short one)
	@IDLM_SOAK=1 exec "$(BIN)/python" -m pytest tests/soak -s $(ARGS)

bench: $(STAMP) ## compare AR and ISD under load (ARGS=--quick for a first look)
	@exec "$(BIN)/idlm" bench $(if $(MODEL),"$(MODEL)") $(ARGS)

clean: ## remove what was built; the environment stays
	rm -rf build dist .pytest_cache .hypothesis *.egg-info
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment can be shared between checkouts, but is an installation of one of them: the stamp says of which.
ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

# A Python without ensurepip (Debian without python3-venv) lends the environment its own pip.
# PIP_*CONSTRAINT pin the tools that build the package, too: older pips read the first, newer ones the second.
$(STAMP): pyproject.toml constraints.txt
	@"$(or $(PYTHON),false)" -c '$(SUITABLE)' || { echo "make: PYTHON=$(PYTHON) will not do; allowed: Python 3.11 or 3.12" >&2; exit 1; }
	@echo "Installing into $(VENV): about 11 GB and 3 minutes the first time, reused from then on."
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)" >/dev/null 2>&1 || \
	  { "$(PYTHON)" -m venv --without-pip "$(VENV)" && "$(PYTHON)" -m pip --python "$(BIN)/python" install pip; }
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt "$(BIN)/python" -m pip install -c constraints.txt -e '.[test]'
	@echo "$(CURDIR)" > "$@"
