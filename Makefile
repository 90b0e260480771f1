# make demo   the whole pipeline on a real model, on CPU
# make test   the tests, those of a file in one process: what they export is made once
# make check  formatter, linters, types, layers, recipes
# make schema pipeline/report.schema.json, anew from the dataclasses

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check schema

demo: $(INSTALLED)
	$(BIN)/secateur run configs/quickstart.yaml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadscope --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/secateur check configs/quickstart.yaml

schema: $(INSTALLED)
	$(BIN)/python -c "from pipeline.report import json_schema; print(json_schema(), end='')" \
		> pipeline/report.schema.json

# Installs once, and again when the dependencies change.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,demo,dev]'
	touch $@
