# make demo: set up and train the debug model. make test: set up and run the suite. make check: ruff and mypy.
PYTHON ?= python3
VENV := .venv/bin

demo: .venv/core
	$(VENV)/lumina demo

test: .venv/dev
	$(VENV)/pytest -n 2

check: .venv/dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

# Each stamp is newer than what it was installed from, so that both targets can be repeated at no cost.
.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=…")'
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/dev: .venv/core
	$(VENV)/pip install --quiet -c constraints.txt -e .[dev]
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: demo test check clean
