"""Decoding steps on a GPU, compiled and then replayed as CUDA graphs: launched one by one, a step's thousand kernels
would wait for Python at each. A step has static shapes and waits for no number (sight.py), so it can be recorded.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cogvideo.model.transformer import Step

DecodeOne = Callable[..., Tensor]
"""`CogVideoTransformer.decode_by_modules`, compiled or as it is."""
_RECORDING = threading.Lock()
"""Models decode in threads of their own; PyTorch records one graph at a time, and compiles none beside it."""


def replayed(decode: DecodeOne, step: "Step") -> Tensor:
    """Its scores (batch, rows, num_image_tokens), to be read before the next such step, which overwrites them."""
    if step.cache.replay is None:
        step.cache.replay = Replay(decode)
    return step.cache.replay.run(step)


class Replay:
    """One cache's steps, recorded at the first of each number of rows: what is recorded reads and writes that cache."""

    def __init__(self, decode: DecodeOne) -> None:
        self._decode = decode
        self._recorded: dict[int, _Recording] = {}

    def run(self, step: "Step") -> Tensor:
        with torch.cuda.device(step.inputs.device):
            rows = step.inputs.shape[1]
            if rows not in self._recorded:
                with _RECORDING:
                    self._recorded[rows] = _Recording(self._decode, step)
            return self._recorded[rows].run(step.inputs, step.slots)


class _Recording:
    def __init__(self, decode: DecodeOne, step: "Step") -> None:
        self._inputs, self._slots = step.inputs.clone(), step.slots.clone()
        self._text_bias = step.text_bias
        """Read by the graph, so it has to stay. Sights stay with their program, the cache keeps this."""
        step = step._replace(inputs=self._inputs, slots=self._slots)
        decode(*step)  # compiles, sets up libraries: not to be recorded. The cache gets what the step will bring
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads allocate and copy meanwhile is no error
        with torch.cuda.graph(self._graph, stream=_aside(step.inputs.device), capture_error_mode="thread_local"):
            self._scores = decode(*step)

    def run(self, inputs: Tensor, slots: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._slots.copy_(slots)
        self._graph.replay()
        return self._scores


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Where that device's steps are recorded: torch's own stream for it is of whichever device came first."""
    return torch.cuda.Stream(device)
