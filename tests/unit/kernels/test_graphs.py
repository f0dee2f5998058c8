"""What the compiled backend relies on, as far as it shows without a GPU: one graph for all slots and caches."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cogvideo.dtypes import WeightName
from cogvideo.inference.backends import KVCache
from cogvideo.kernels import graphs
from cogvideo.model.inputs import DecodeInputs, TextBias
from cogvideo.model.plan import DecodeMasks, plan_forward
from cogvideo.model.quantize import convert_weights
from cogvideo.model.transformer import TransformerLayer, compile_layer
from tests.helpers import decoding as tiny


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@torch.inference_mode()
def test_all_layers_in_all_steps_of_a_clip_are_one_graph(weights: WeightName) -> None:
    torch._dynamo.reset()
    traced: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable:
        traced.append(len(graph.graph.nodes))
        return graph.forward

    model = tiny.model("interpolation", window_size=2)
    convert_weights(model, weights)
    config, layout = model.config, model.config.layout
    compiled = partial(model.decode, run_layer=compile_layer(TransformerLayer, backend))
    mask = torch.ones(2, 5, dtype=torch.bool)
    bias, text = TextBias.from_mask(mask, 0.3), torch.full(mask.shape, tiny.VOCABULARY.newline)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(tiny.NUM_CODES, size=(2, layout.num_slots)))
    given = layout.slots_of(*layout.given_frames)
    caches = [KVCache.allocate(config, batch=2, text_len=5) for _ in range(3)]
    for cache in caches:
        model(tokens[:, given], plan_forward(config, given), bias, text=text, cache=cache)
    masks = DecodeMasks.from_config(config)
    for cache in caches[:2]:  # a second clip brings a cache of its own
        for slot in layout.slots_of(*layout.generation_order)[:20]:
            slots = torch.tensor([slot])
            step = DecodeInputs(tokens.index_select(1, slots), slots, masks, bias, cache)
            expected = model.decode(step._replace(cache=caches[2]))
            torch.testing.assert_close(compiled(step), expected)
    assert len(traced) == 1
    torch._dynamo.reset()


def test_threads_record_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch requires it, and must be told that other threads allocate meanwhile; torch.cuda is replaced."""
    busy, modes = threading.Lock(), []

    @contextmanager
    def alone() -> Iterator[None]:
        assert busy.acquire(blocking=False), "two threads compile or record at once"
        time.sleep(0.02)
        yield
        busy.release()

    @contextmanager
    def graph(recorded: Any, *, capture_error_mode: str = "global", **where: Any) -> Iterator[None]:
        modes.append(capture_error_mode)
        yield

    def double(x: torch.Tensor) -> torch.Tensor:
        with alone():
            return x * 2

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "Stream": lambda *device: stream,
        "current_stream": lambda: stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs._recording_stream.cache_clear()
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda n: graphs.Graphs().run("x", double, torch.full((1,), n)), range(4)))
    assert torch.cat(results).tolist() == [0, 2, 4, 6]
    assert modes == ["thread_local"] * 4
    graphs._recording_stream.cache_clear()
