# Everything a newcomer needs: `make demo` shows the main job, `make test` runs the whole suite.
# Both set up the environment first (.venv, from pyproject.toml, in the versions of constraints.txt); nothing else needs to be installed by hand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the public data sets, where they lie beside the checkout (benchmarks/README.md); tests that need them skip without
ifneq ($(wildcard ../shared/data),)
export PARETUNE_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help demo test check format bench docs clean

help:
	@echo 'make demo    set up, then: real request log -> curve -> chosen spec -> running server -> predicted X, measured Y'
	@echo 'make test    set up, then the whole test suite'
	@echo 'make check   set up, then ruff, mypy and documentation drift'
	@echo 'make format  let ruff put the code in shape'
	@echo 'make bench   the benchmarks behind the figures in the documentation (about an hour and a half on two cores)'
	@echo 'make docs    write docs/cli.md and docs/spec.schema.json anew'
	@echo 'make clean   delete the environment and everything generated'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/paretune demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

format: $(VENV)/.installed
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

bench: $(VENV)/.installed
	for script in startup simulator_speed scheduler_overhead step_overhead prediction_local per_request kernels_cpu lora physics roofline_calibration runtime_peers serving_load soak load_generators; do \
	  $(BIN)/python benchmarks/$$script.py || exit 1; \
	done

clean:
	rm -rf $(VENV) out build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
