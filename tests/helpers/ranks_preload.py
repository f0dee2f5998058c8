"""Imported by the server process that `ranks.py` forks from: slow imports that start no threads.

In its forks, training draws no curves.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401
import torch._dynamo  # noqa: F401

from cogvideo.training import trainer
from tests.helpers.training import draw_one_pixel

trainer.draw_curves = draw_one_pixel
