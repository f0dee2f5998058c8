# `make demo` and `make test` work on a fresh clone: they create .venv, install into it, and run; later calls reuse it.
#
# TORCH is the torch to install into a new .venv. The default may be a CUDA build; a machine without a GPU saves 2 GB with
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0

# Tools that start tools by name (DeepSpeed's launcher, ninja) must find those of .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test quick lint docs pretrained clean

demo: .venv/.installed
	python scripts/demo.py

# Every test, on all cores.
test: .venv/.installed
	python -m pytest -n logical --dist worksteal

# The loop while developing: lint, and the unit tests that take less than ten seconds each.
quick: lint
	python -m pytest -n logical --dist worksteal -m "not slow" tests/unit

lint: .venv/.installed
	ruff check .
	ruff format --check .
	mypy
	lint-imports

# The site, into site/; it needs no network.
docs: .venv/.docs
	mkdocs build --strict

# Train from nothing: text and image tokenizer, trunk, both stages, in hours on two cores. Replaces the bundled weights,
# whose stages were trained longer (pretrain_tiny.py --long).
pretrained: .venv/.installed
	python scripts/pretrain_tiny.py

.venv/.installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -c "import torch" 2>/dev/null || python -m pip install --quiet $(TORCH)
	python -m pip install --quiet --editable ".[dev]"
	touch $@

.venv/.docs: .venv/.installed
	python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
