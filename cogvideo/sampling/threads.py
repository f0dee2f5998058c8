"""How many CPU threads a decoding step is worth. Only speed depends on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cogvideo.model.config import ModelConfig

SMALL_STEP = 10_000_000
"""Multiplications a step, a fraction of a millisecond's worth."""


@contextmanager
def one_thread_if_small(model: ModelConfig, rows: int) -> Iterator[None]:
    """Keep steps of a small model on one thread: they are over before a second one is awake, the more so on a busy
    machine, where waiting for it took four times as long as all the work.
    """
    before = torch.get_num_threads()
    if rows * model.num_layers * 12 * model.hidden_size**2 < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
