# `make demo` and `make test` are all that is needed; both install what they need into .venv, once.
PYTHON_VENV = .venv/bin/python

.PHONY: help install demo study robustness docs test test-all lint format

help:
	@echo 'make demo     train, evaluate, fuse and compare a small Mask R-CNN with DenoiseRep (under 15 minutes on 2 cores)'
	@echo 'make study    the same for seven small models and three seeds, into docs/study.md (hours on 2 cores)'
	@echo 'make robustness   fit them to corrupted images, beside rivals, into docs/domain.md (over an hour on 2 cores)'
	@echo 'make docs     build the pages in docs into site/, with the notebook run'
	@echo 'make test     run the tests, with some of the configs at full size'
	@echo 'make test-all run the tests with every backbone, and every config at full size'
	@echo 'make lint     ruff, mypy and docstring coverage'
	@echo 'make format   let ruff rewrite the code'
	@echo 'make install  only create .venv and install the pinned stack'

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

lint: install
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check .
	@$(PYTHON_VENV) -m mypy mmdenoiserep/core
	@$(PYTHON_VENV) -m interrogate mmdenoiserep tools studies

format: install
	@$(PYTHON_VENV) -m ruff check --fix .
	@$(PYTHON_VENV) -m ruff format .
