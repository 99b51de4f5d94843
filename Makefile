# make quickstart   the whole RLHF loop on this machine, with a report at the end
# make test         every test            make check   format, lint, types
# make fix          format and mend       make lock    resolve the pins again
#
# Each target first makes .venv with exact pins, once. PYTHON chooses the interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is what makes the many processes of Ray and vLLM start quickly.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check fix lock clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -5

# The stamp is newer than every requirement once the installation has succeeded.
$(VENV)/.runtime: requirements/torch-cpu.txt requirements/cpu.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is not installed: install Python 3.11, or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (about 4 GB, once)"
	@# Without bytecode, which takes pip longer than all the rest: the first start compiles the
	@# part that is used. torch apart, so that only it is looked up on PyTorch's own index.
	$(BIN)/pip install --quiet --no-compile --no-deps --retries 1 -r requirements/torch-cpu.txt
	$(BIN)/pip install --quiet --no-compile --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/dev.txt
	@touch $@

setup: $(VENV)/.runtime

quickstart: $(VENV)/.runtime
	$(BIN)/rlhf quickstart $(ARGS)

test: $(VENV)/.dev
	@# Two at a time, each with a Ray of its own: much of a test is waiting for processes to start.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Resolves on any machine that reaches PyTorch's index or has its wheel in UV_FIND_LINKS.
lock: $(VENV)/.dev
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-annotate --no-header \
	  --override requirements/overrides.txt --no-emit-package torch \
	  requirements/cpu.in --output-file requirements/cpu.txt
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-annotate --no-header \
	  --constraint requirements/cpu.txt requirements/dev.in --output-file requirements/dev.txt
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-annotate --no-header \
	  --constraint requirements/cpu.txt requirements/privacy.in --output-file requirements/privacy.txt

clean:
	rm -rf $(VENV)
