# make train   everything, from an empty machine with Python 3.11+ to a trained model
# make test    everything, to a tested checkout
PYTHON ?= python3
VENV   ?= .venv
DATA   ?= phantom
RUN    ?= runs/$(basename $(notdir $(DATA:/=)))
ARGS   ?=

BIN := $(VENV)/bin

# Seconds for each of the tests that change bytes at random.
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
	$(BIN)/python experiments/pneumonia.py --data.root "$(DATA)" --workdir "$(RUN)" $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -n auto --dist worksteal

# What happens with bad input, a full disk, a killed process: a table of what was tried.
faults: install
	$(BIN)/python -m pytest -n auto --dist worksteal -m faults

fuzz: install
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -n auto -rP -p no:logging tests/faults/test_fuzz.py

# The documentation as a site in site/; a broken link is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The newest versions that serve every Python from 3.11 on, with hashes; needs uv.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-emit-index-url --upgrade --output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
