# Two commands are enough: make train, make test. Both set up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: help install train evaluate figures report test soak bench docs lint clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(VENV)/.installed  ## create .venv and install the package into it

train: install  ## train with the defaults, or: make train ARGS="task=reasoning curriculum.max_segments=3"
	$(BIN)/python -m rmt_lightning.train $(ARGS)

evaluate: install  ## test a run on longer inputs: make evaluate ARGS="checkpoint=outputs/…"
	$(BIN)/python -m rmt_lightning.evaluate $(ARGS)

figures: install  ## draw the figures of experiments/ again from their csv files
	$(BIN)/python experiments/figures.py

report: install  ## compare runs on one HTML page: make report ARGS="outputs"
	$(BIN)/python -m rmt_lightning.report $(ARGS)

test: $(VENV)/.installed-test  ## run linter, type checker and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

soak: $(VENV)/.installed-test  ## try every fault, with the tests that make test leaves out; ends with a table
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "soak or fault" $(ARGS)

bench: install  ## measure speed beside the published way and the machine's limit: experiments/benchmarks
	$(BIN)/python experiments/benchmarks/run.py $(ARGS)

docs: $(VENV)/.installed-test  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

lint: $(VENV)/.installed-test  ## let the linter mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[report]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/.installed
