"""Decoding steps on a GPU as CUDA graphs: launched one by one, each of a step's thousand kernels would wait for Python.

A step has static shapes and never reads a number back from the GPU (`model.plan.DecodeMasks`), so it can be recorded
once per number of rows and replayed for any slots.
"""

import threading
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cogvideo.model.inputs import DecodeInputs

DecodeFunction = Callable[[DecodeInputs], Tensor]
"""`CogVideoTransformer.decode`, compiled or not."""
_RECORDING_LOCK = threading.Lock()
"""Models may decode in several threads; PyTorch records one graph at a time, and must not compile meanwhile."""


class StepGraphs:
    """The recorded steps of one cache, one graph per number of rows: a graph reads and writes that cache's memory."""

    def __init__(self, decode: DecodeFunction) -> None:
        self._decode = decode
        self._graphs: dict[int, _StepGraph] = {}

    def run(self, step: DecodeInputs) -> Tensor:
        """Logits (batch, rows, num_image_tokens); the next such step overwrites them."""
        with torch.cuda.device(step.tokens.device):
            rows = step.tokens.shape[1]
            if rows not in self._graphs:
                with _RECORDING_LOCK:
                    self._graphs[rows] = _StepGraph(self._decode, step)
            return self._graphs[rows].run(step.tokens, step.slots)


class _StepGraph:
    def __init__(self, decode: DecodeFunction, step: DecodeInputs) -> None:
        self._tokens, self._slots = step.tokens.clone(), step.slots.clone()
        self._text_bias, self._masks = step.text_bias, step.masks  # the graph reads them: keep them alive
        step = step._replace(tokens=self._tokens, slots=self._slots)
        # the first run compiles and sets up libraries, which cannot be recorded; it stores the same keys again
        decode(step)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate and copy meanwhile
        stream = _recording_stream(step.tokens.device)
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = decode(step)

    def run(self, tokens: Tensor, slots: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        self._slots.copy_(slots)
        self._graph.replay()
        return self._logits


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: torch's default recording stream belongs to the device that recorded first."""
    return torch.cuda.Stream(device)
