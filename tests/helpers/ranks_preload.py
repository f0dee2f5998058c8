"""Imported by the server that `ranks.py` forks from: all that takes long to import, and no thread."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch._dynamo  # noqa: F401

import cogvideo.training.previews
import cogvideo.training.trainer  # noqa: F401
