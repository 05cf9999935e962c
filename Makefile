# From a fresh clone: `make demo` shows rows, `make test` runs the tests. Needs make and Python 3.11 or newer; npm, if
# there, adds anvil as an EVM node. GNU make 3.81 is enough (macOS ships no newer one).

# The first that is new enough and can make a venv; `make PYTHON=/path/to/python` overrides it.
PYTHON  ?=
VENV    := .venv
BIN     := $(VENV)/bin
ANVIL   := 1.7.1
SECONDS ?=
ARGS    ?=
# Where `make lock` reads and writes the locks; .ci/run points it at a copy, to see whether anything would change.
LOCKS   ?= .

.DEFAULT_GOAL := help
.PHONY: help demo test chaos day lint bench lock clean install anvil

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

# --- the virtual environment ------------------------------------------------------------------------------------------
# One venv, two sizes. The demo needs only the runtime and the embedded server, which makes its first run much faster;
# once the developers' set is installed it contains the demo's, so the demo uses that.
# Stamps: `.locked-X` is as new as the lock that was installed, `.X` as the project itself, installed editable.
DEMO := $(if $(wildcard $(VENV)/.dev),$(VENV)/.dev,$(VENV)/.demo)

# `uv` does the same from the same hashed locks, ten times faster. A venv that uv made has no pip: hence ensurepip.
define install
	@if command -v uv >/dev/null; then \
	  uv pip install -q --python $(BIN)/python $(1); \
	else \
	  { $(BIN)/python -c 'import pip' 2>/dev/null || $(BIN)/python -m ensurepip >/dev/null; } && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check $(1); \
	fi
endef

$(BIN)/python:
	@for p in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11); do \
	  "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "Making $(VENV) with $$("$$p" --version) ..."; \
	  exec "$$p" -m venv --clear $(VENV); \
	done; \
	echo "No Python 3.11 or newer that can make a venv (on Debian: apt install python3-venv)." \
	     "Name one: make PYTHON=/path/to/python" >&2; exit 1

$(VENV)/.locked-demo: requirements-demo.lock requirements-build.lock | $(BIN)/python
	@echo "Installing what the demo needs ..."
	$(call install,--require-hashes -r requirements-demo.lock -r requirements-build.lock)
	@touch $@

$(VENV)/.locked-dev: requirements-dev.lock requirements-build.lock | $(BIN)/python
	@echo "Installing what development needs ..."
	$(call install,--require-hashes -r requirements-dev.lock -r requirements-build.lock)
	@touch $@

# Without build isolation: the build backend, with what it wants for an editable install, is in requirements-build.lock,
# so nothing is downloaded that has no hash.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.locked-% pyproject.toml
	$(call install,--no-deps --no-build-isolation -e .)
	@touch $@

install: $(VENV)/.dev

# --- anvil ------------------------------------------------------------------------------------------------------------
# An EVM node in one binary, from npm; where it can't be had, the tests that need it are skipped and the demo simulates
# its node. No package-lock: npm records there the packages of every platform, and refuses a registry that lacks one.
# --ignore-scripts: its install script only repairs what npm has done already.
# In CI the tests insist on it: a failed install would hide that they were skipped.
anvil:
	@if [ -n "$$ANVIL_BIN" ] || command -v anvil >/dev/null || [ -e .dev/.anvil-$(ANVIL) ]; then exit 0; fi; \
	if ! command -v npm >/dev/null; then echo "No npm, so no anvil: going on without." >&2; exit 0; fi; \
	echo "Installing anvil $(ANVIL) ..."; mkdir -p .dev; \
	if npm install --no-save --no-package-lock --ignore-scripts --no-audit --no-fund --loglevel=error \
	     --fetch-retries=1 --fetch-timeout=30000 --prefix .dev @foundry-rs/anvil@$(ANVIL) >.dev/npm.log 2>&1 \
	   && ls .dev/node_modules/@foundry-rs/anvil-*/bin/anvil* >/dev/null 2>&1; \
	then touch .dev/.anvil-$(ANVIL); exit 0; fi; \
	head -n 4 .dev/npm.log >&2; \
	if [ -n "$$CI" ] && [ "$(STRICT)" = yes ]; then echo "Anvil could not be installed." >&2; exit 1; fi; \
	echo "Anvil could not be installed: going on without." >&2

# --- what people type -------------------------------------------------------------------------------------------------
# `exec`, so that a Ctrl-C reaches the program itself and make adds no more than its own last line. Make's exit code for
# any failure is 2; the program's own code stands in the line that make prints.
demo: $(DEMO) anvil ## a chain, a database and the rows, on this machine (SECONDS=30; ARGS="--network audius")
	@exec $(BIN)/indexer demo $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

test: STRICT := yes
test: $(VENV)/.dev anvil ## all tests, four at a time (ARGS="tests/test_x.py -k name")
	@exec $(BIN)/python -m pytest $(or $(ARGS),-n 4 --maxschedchunk 1)

chaos: $(VENV)/.dev ## random histories of forks, lies and deaths (SECONDS=600; CHAOS_SEED=17 tells one again)
	@exec $(BIN)/python tests/chaos.py --seconds $(or $(SECONDS),60) $(ARGS)

day: $(VENV)/.dev ## a simulated day of 5,000 people who listen, with two sidecars and kills (ARGS="--people 500 --hours 6")
	@exec $(BIN)/python tests/listening_day.py $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev anvil ## how fast history is, beside the floor
	@exec $(BIN)/python -m benchmarks.history $(ARGS)

# Pins are kept wherever they still fit pyproject.toml, so that a new dependency changes its own lines only;
# `make lock UPGRADE=1` takes the newest of everything. The others follow the developers' lock, so that all agree.
# A uv.lock plays no part: it holds the addresses of the files.
COMPILE := uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header
FOLLOW  := $(COMPILE) -c $(LOCKS)/requirements-dev.lock
lock: ## the hashed locks anew from pyproject.toml (UPGRADE=1 for newer versions); needs uv
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --all-extras -o $(LOCKS)/requirements-dev.lock >/dev/null
	$(FOLLOW) pyproject.toml --extra embedded -o $(LOCKS)/requirements-demo.lock >/dev/null
	$(FOLLOW) pyproject.toml -o $(LOCKS)/requirements.lock >/dev/null
	printf 'hatchling\neditables\n' | $(FOLLOW) - -o $(LOCKS)/requirements-build.lock >/dev/null

clean: ## away with everything that make made
	rm -rf $(VENV) .dev dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
