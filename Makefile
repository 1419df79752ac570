# make train   installs everything and trains; needs only Python 3.11 or newer
# make test    installs everything and runs lint and the fast tests
PYTHON ?= python3
VENV   ?= .venv
DATA   ?= phantom
RUN    ?= runs/$(basename $(notdir $(DATA:/=)))
ARGS   ?=

# Phantoms are learned in a third of the recipe's epochs.
EPOCHS := $(if $(filter phantom,$(DATA)),--train.epochs 24)

BIN := $(VENV)/bin

# Seconds for each test with random changes of files.
FUZZ_SECONDS ?= 60

.PHONY: help install train test test-slow faults fuzz docs lint lock clean

help:
	@echo "make train [DATA=DIR|ZIP|NPZ] [RUN=DIR] [ARGS='--train.epochs 40']"
	@echo "make test | test-slow | faults | fuzz [FUZZ_SECONDS=60] | lint | docs | install | lock | clean"

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name a newer one with make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

train: install
	$(BIN)/python experiments/pneumonia.py --data.root "$(DATA)" --workdir "$(RUN)" $(EPOCHS) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -n auto --dist worksteal

# Tests of bad input, full disks and killed processes; prints a table of them.
faults: install
	$(BIN)/python -m pytest -n auto --dist worksteal -m faults

fuzz: install
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -n auto -rP -p no:logging tests/faults/test_fuzz.py

# Builds the documentation in site/; a broken link is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Locks the newest versions that support every Python from 3.11 on, with hashes; needs uv.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-emit-index-url --upgrade --output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
