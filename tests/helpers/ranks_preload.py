"""Imported by the server process that `ranks.py` forks from: slow imports that start no threads."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch._dynamo  # noqa: F401

import cogvideo.training.trainer  # noqa: F401
