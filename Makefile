# Two commands are enough: make train, make test. Both set up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PINS   := constraints.txt
ARGS   ?=

.PHONY: help install train evaluate figures report test lowest soak bench docs lint clean

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

lowest:  ## run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) VENV=.venv-lowest PINS=.venv-lowest/pins.txt .venv-lowest/.installed-test
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

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
	rm -rf $(VENV) .venv-lowest .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml $(PINS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable '.[report]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml $(PINS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable '.[test]'
	touch $@ $(VENV)/.installed

# Each lower bound as the only version.
.venv-lowest/pins.txt: pyproject.toml
	mkdir -p $(@D)
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z]+\])?>=[0-9.]+' $< | sed -E 's/"|\[.*\]//g; s/>=/==/' > $@
