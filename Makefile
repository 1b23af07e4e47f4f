# Every target installs the pinned stack into .venv first, once.
PYTHON_VENV = .venv/bin/python

.PHONY: help install demo study robustness docs test test-all test-gpu lint format

help:
	@echo 'make demo     train, evaluate, fuse and compare a small Mask R-CNN with DenoiseRep (under 15 minutes on 2 cores)'
	@echo 'make study    train seven small models with three seeds and write docs/study.md (hours on 2 cores)'
	@echo 'make robustness   fit them to corrupted images by several methods and write docs/domain.md (two hours)'
	@echo 'make docs     run the notebook and build the pages of docs into site/'
	@echo 'make test     run the tests, with some of the configs at full size'
	@echo 'make test-all run the tests with every backbone, and every config at full size'
	@echo 'make test-gpu run the tests of a device on CUDA (DEVICE=cpu tries them on the CPU); installs nothing'
	@echo 'make lint     ruff, mypy, docstring coverage, shellcheck, and the schemas of the workflows'
	@echo 'make format   format the code with ruff'
	@echo 'make install  only create .venv and install the pinned stack'
	@echo 'In the environment of the first make: PYTHON=python3.12 chooses the Python, STACK=onedl the maintained fork of'
	@echo 'OpenMMLab, TORCH_INDEX=URL another build of torch'

install:
	@bash requirements/install.sh

demo: install
	@$(PYTHON_VENV) -m studies.demo

study: install
	@$(PYTHON_VENV) -m studies.study

robustness: install
	@$(PYTHON_VENV) -m studies.robustness

docs: install
	@OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(PYTHON_VENV) -m mkdocs build

test: install
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n 2

test-all: install
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n 2 -m ''

test-gpu:
	@OMP_NUM_THREADS=1 $(firstword $(wildcard $(PYTHON_VENV)) $(PYTHON) python3) -m pytest tests/gpu -rs --device $(or $(DEVICE),cuda)

lint: install
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check .
	@$(PYTHON_VENV) -m mypy mmdenoiserep/core
	@$(PYTHON_VENV) -m interrogate mmdenoiserep tools studies
	@$(PYTHON_VENV:python=shellcheck) requirements/*.sh tools/*.sh
	@$(PYTHON_VENV) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*
	@$(PYTHON_VENV) -m check_jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[0-9]*
	@$(PYTHON_VENV) -m check_jsonschema --builtin-schema vendor.readthedocs .readthedocs.yaml

format: install
	@$(PYTHON_VENV) -m ruff check --fix .
	@$(PYTHON_VENV) -m ruff format .
