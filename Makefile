# make demo        compress a sample clip on this machine (no GPU, no download of a model)
# make test        the tests, with the versions of constraints.txt; ARGS are handed to pytest
# make test-oldest the same with the oldest supported transformers
# make test-lmms-eval  lmms-eval itself, offline, in an environment of its own (5 minutes)
# make test-report the pages of `vidcompress report` in Chromium (needs chromium and chromedriver)
# make test-vllm   the serving plugin with vLLM's CPU build, in an environment of its own (3.6 GB)
# make lint        ruff
# make types       mypy on the installed wheel
# make check       lint, types, test
# make tables      what is generated: tables of README.md, scripts/reproduce
# make bench       times of all methods at the size of LLaVA-OneVision-7B
#
# Variables: PYTHON (3.11 or newer, default python3), VENV (.venv), VENV_OLDEST (.venv-oldest), VENV_VLLM (.venv-vllm),
# ARGS.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_VLLM ?= .venv-vllm
ARGS ?=

PY := $(abspath $(VENV))/bin/python
PY_OLDEST := $(abspath $(VENV_OLDEST))/bin/python
FILES := pyproject.toml setup.py constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-oldest test-lmms-eval test-report test-vllm lint types check tables bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.installed-demo
	$(abspath $(VENV))/bin/vidcompress demo

test: $(VENV)/.installed-dev
	$(PY) -m pytest -n auto $(ARGS)

# Without what never meets transformers: ops, kernels, and methods on tokens alone.
test-oldest: $(VENV_OLDEST)/.installed-dev
	$(PY_OLDEST) -m pytest -n auto --ignore-glob='*/test_ops*' --ignore-glob='*/test_kernels*' \
		--ignore-glob='*/test_baseline*' --ignore=tests/test_golden.py --ignore-glob='*/test_methods*' \
		--ignore=tests/test_house.py --ignore=tests/test_packaging.py $(ARGS)

test-lmms-eval:
	PYTHON=$(PYTHON) bash scripts/test_lmms_eval.sh $(ARGS)

test-report: $(VENV)/.installed-dev
	VENV=$(VENV) bash scripts/test_report.sh

test-vllm:
	PYTHON="$(PYTHON)" VENV_VLLM="$(VENV_VLLM)" scripts/test_vllm.sh $(ARGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .

# At the root mypy would find ./vidcompress, not see patches/ and pass; the wheel has everything in its place.
types: $(VENV)/.installed-dev
	rm -rf build/types && mkdir -p build/types
	$(PY) -m build --no-isolation --outdir build/types/dist . > build/types/log 2>&1 || { cat build/types/log; exit 1; }
	$(PY) -m pip install --quiet --no-deps --target build/types/site build/types/dist/*.whl
	cd build/types/site && $(PY) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p vidcompress

check: lint types test

bench: $(VENV)/.installed-dev
	$(PY) scripts/bench_methods.py $(ARGS)

tables: $(VENV)/.installed-dev
	$(PY) scripts/make_tables.py
	$(PY) scripts/make_reproduce.py

clean:
	rm -rf build dist *.egg-info $(VENV) $(VENV_OLDEST) $(VENV_VLLM) .venv-eval .venv-ray .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamps are newer than the files they depend on, so pip runs again only when one of these has changed.
$(VENV)/.installed-demo: $(FILES) | $(VENV)/bin/python
	$(PY) -m pip install -c constraints.txt -e ".[video,cli]"
	touch $@

$(VENV)/.installed-dev: $(FILES) | $(VENV)/bin/python
	$(PY) -m pip install -c constraints.txt -e ".[dev]"
	touch $@

$(VENV_OLDEST)/.installed-dev: $(FILES) constraints-oldest.txt | $(VENV_OLDEST)/bin/python
	awk -F '==' '/^#/ {next} NR == FNR {old[$$1] = 1; print; next} !($$1 in old)' \
		constraints-oldest.txt constraints.txt > $(VENV_OLDEST)/constraints.txt
	$(PY_OLDEST) -m pip install -c $(VENV_OLDEST)/constraints.txt -e ".[dev]"
	touch $@

$(VENV)/bin/python $(VENV_OLDEST)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) must be Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo "$(PYTHON) has no venv or ensurepip; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(@D:/bin=)
