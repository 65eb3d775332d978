# make train | make test | make test-all | make bench | make style | make quality | make clean
# Everything happens in .venv, which is made on first use.
PYTHON ?= python3
VENV ?= .venv
HOUSE = configuration modeling_vit_adapter conversion kernels training
RECIPE ?= training/recipes/sample.yaml
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: train test test-all bench style quality clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	$(VENV)/bin/accelerate launch --quiet training/train.py $(RECIPE)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

test-all: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m ""

bench: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/ms_deform_attn.py

style: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# mypy follows package_dir only through a folder that looks like the installed package.
quality: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p $(VENV)/types/vit_adapter
	ln -sfn $(CURDIR)/vit_adapter/*.py $(HOUSE:%=$(CURDIR)/%) $(VENV)/types/vit_adapter/
	MYPYPATH=$(VENV)/types $(VENV)/bin/mypy

$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
