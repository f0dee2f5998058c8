"""GPU functions recorded as CUDA graphs: launched singly, each of a step's thousand kernels would wait for Python.

A decoding step has static shapes and never reads a number back from the GPU (`model.plan.DecodeMasks`), so it can be
recorded once per number of rows and replayed for any slots.
"""

import threading
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor

_RECORDING_LOCK = threading.Lock()
"""Models may decode in several threads; PyTorch records one graph at a time, and must not compile meanwhile."""


class Graphs:
    """Recorded functions, by key. They belong to the owner of the memory that they read and write."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, _Graph] = {}

    def run(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, recorded when `key` first occurs. The next run of the key overwrites its result."""
        with torch.cuda.device(inputs[0].device):
            if key not in self._graphs:
                with _RECORDING_LOCK:
                    self._graphs[key] = _Graph(function, inputs)
            return self._graphs[key].run(inputs)


class _Graph:
    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [x.clone() for x in inputs]
        # the first run compiles and sets up libraries, which cannot be recorded; it writes what the replay writes
        function(*self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate and copy meanwhile
        stream = _recording_stream(inputs[0].device)
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._result = function(*self._inputs)

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._result


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: torch's default recording stream belongs to the device that recorded first."""
    return torch.cuda.Stream(device)
