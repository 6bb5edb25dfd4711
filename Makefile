.PHONY: check test test-all format

check:            ## lint and types
	ruff check .
	ruff format --check .
	mypy

test:             ## the fast tests
	pytest

test-all:         ## slow and fault tests too, as CI runs them
	pytest -m "not gpu"

format:
	ruff check --fix .
	ruff format .
