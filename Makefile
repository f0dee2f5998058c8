# `make demo` and `make test` work on a fresh clone: they create .venv, install into it, and run; later calls reuse it.
#
# TORCH is the PyTorch to install into a new .venv. The default may be a CUDA build; without a GPU, this saves 2 GB:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0

TORCH_PACKAGES := torch cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cccl \
  nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile \
  nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 \
  nvidia-nvtx triton

# Programs that are started by name, such as DeepSpeed's launcher and ninja, must be those of .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test quick lint docs lock pretrained clean

demo: .venv/.installed
	python scripts/demo.py

# Every test, on all cores.
test: .venv/.installed
	python -m pytest -n logical --dist worksteal

# For the development loop: lint, and the unit tests that take less than ten seconds each.
quick: lint
	python -m pytest -n logical --dist worksteal -m "not slow" tests/unit

lint: .venv/.installed
	ruff check .
	ruff format --check .
	mypy
	lint-imports

# Build the documentation into site/; reading it needs no network.
docs: .venv/.docs
	mkdocs build --strict

# Regenerate requirements.lock, the packages with hashes that the GitHub workflow installs. PyTorch and its CUDA
# libraries are left out: which of them to install depends on the machine.
lock: .venv/.installed
	python -m pip install --quiet uv
	uv pip compile --quiet --upgrade --extra dev --generate-hashes --python-version 3.11 \
	  --python-platform x86_64-unknown-linux-gnu $(addprefix --no-emit-package ,$(TORCH_PACKAGES)) \
	  --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

# Train from scratch into runs/tiny/bundle: both tokenizers, trunk and both stages; takes hours on two cores.
# The bundled weights were trained longer (pretrain_tiny.py --long --superres).
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
