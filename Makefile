# `make demo` and `make test` on a fresh clone make .venv, install, and run; later calls reuse it.
#
# TORCH says what to install as torch where .venv has none. Where the default is a CUDA build, a machine without a GPU
# saves 2 GB with:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0

# Tools that start tools by name (DeepSpeed's launcher, ninja) must find those of .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test lint pretrained clean

demo: .venv/.installed
	python scripts/demo.py

test: .venv/.installed
	python -m pytest

lint: .venv/.installed
	ruff check .
	mypy
	lint-imports

# Weights from nothing: text and image tokenizer, trunk, both stages; replaces the bundled ones, for which stage 1 went on
# longer (pretrain_tiny.py --long). Hours on two cores.
pretrained: .venv/.installed
	python scripts/pretrain_tiny.py

.venv/.installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -c "import torch" 2>/dev/null || python -m pip install --quiet $(TORCH)
	python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
