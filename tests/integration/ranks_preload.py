"""Imported by the server that `ranks.py` forks from: all that takes long to import, and no thread."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401, E402

import cogvideo.cli.preview  # noqa: F401, E402
import cogvideo.training.trainer  # noqa: F401, E402
