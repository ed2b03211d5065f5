# Needs Python 3.11 or newer with venv. Everything goes into .venv; delete it to start afresh.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned: an unpinned torch may bring gigabytes of GPU libraries a CPU machine has no use for.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check install install-dev clean

demo: install
	$(BIN)/bsdiff-rt infer examples/ --output out/ --preview --overwrite
	$(BIN)/bsdiff-rt evaluate out/ benchmarks/examples_truth/ --cxr examples/
	@echo
	@echo "Look at out/preview.png: X-ray | soft tissue | bone. Above: quality against the phantoms' known truth."

test: install-dev
	$(MAKE) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache *.egg-info
