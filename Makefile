# Needs Python 3.11 or newer with venv. Everything goes into .venv; delete it to start afresh.
# RUNTIME is the extra that brings ONNX Runtime: cpu or cuda (docs/install.md).
PYTHON ?= python3
RUNTIME ?= cpu
VENV := .venv
BIN := $(VENV)/bin
# torch first: where the CPU build was installed or configured, the rest takes it as it is.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread a process: the tests run in two processes, and many threads on two cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# Tests start many processes. Without cached bytecode, which some containers switch off, each compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test services quick check wheel install install-dev clean

demo: install
	$(BIN)/bsdiff-rt infer examples/ --output out/ --preview --html --overwrite
	$(BIN)/bsdiff-rt evaluate out/ benchmarks/examples_truth/ --cxr examples/
	@echo
	@echo "Open out/report.html in a browser. Above: quality against the phantoms' known truth."

test: install-dev check
	$(PYTEST) -m 'not services' --cov --cov-report=term:skip-covered --cov-fail-under=90

# One after another: each starts several processes.
SERVICES := $(addprefix tests/, folder/test_ray_workers.py folder/test_storage_runs.py node/test_with_orthanc.py \
	folder/test_html_in_chromium.py node/test_page_in_chromium.py benchmarks/test_reader_study.py)

# What `make test` leaves out: tests with Ray, S3 (moto's server) and, where Debian's packages are, Orthanc and Chromium.
services: install-dev
	$(PIP_INSTALL) --editable '.[services]'
	$(PYTEST) --numprocesses 0 -m services -rs $(SERVICES)

quick: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) --quick

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the source archive and the wheel, installs the wheel into an empty environment and runs it there.
wheel: install-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python .ci/check_wheel.py dist/*.whl

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[$(RUNTIME)]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[dev,$(RUNTIME)]'
	touch $@

clean:
	rm -rf $(VENV) out dist build .mypy_cache .ruff_cache .pytest_cache .coverage *.egg-info
