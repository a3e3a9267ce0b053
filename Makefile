# make demo: set up and train the debug model. make demo-rescue: break a run, and see it rescued.
# make test: set up and run the suite. make gauntlet: break a few runs, and see each end as it has to.
# make check: ruff and mypy. make hooks: ruff and mypy before each commit.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

demo: $(VENV)/core
	$(BIN)/lumina demo

demo-rescue: $(VENV)/core
	$(BIN)/lumina rescue

test: $(VENV)/dev
	$(BIN)/pytest -n 2

gauntlet: $(VENV)/core
	$(BIN)/lumina gauntlet --subset ci

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

hooks: $(VENV)/dev
	$(BIN)/pip install --quiet pre-commit && $(BIN)/pre-commit install

# Each stamp is newer than what it was installed from, so that both targets can be repeated at no cost.
$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=…")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(BIN)/pip install --quiet -c constraints.txt -e .[dev]
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: demo demo-rescue test gauntlet check hooks clean
