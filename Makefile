# Everything a fresh machine with Python 3.11 and make needs. `make demo` and `make test` set themselves up.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup demo test check format
setup: .venv/.done
.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python cluster/run_pipeline.py digits

# A thread for each process: on two cores, threads that wait for each other cost more than they bring.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
