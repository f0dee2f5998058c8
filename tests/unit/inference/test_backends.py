"""Backends: which there are, that they agree, and that they keep nothing of a cache that is gone."""

import gc
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideo.dtypes import WeightName
from cogvideo.inference import backends
from cogvideo.inference.backends import (
    BACKENDS,
    CompiledBackend,
    CpuBackend,
    EagerBackend,
    KVCache,
    install_kernels,
    open_backend,
)
from cogvideo.inference.batching import BatchScheduler
from cogvideo.inference.engine import BatchKind, ClipState, Conditioning, Engine, build_program
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import SCHEDULES, wavefront
from cogvideo.kernels import cpu
from cogvideo.model.attention import ATTENTION
from cogvideo.model.quantize import Linear, convert_weights
from cogvideo.model.transformer import compile_layer
from tests.helpers import decoding as tiny
from tests.helpers.models import tiny_config, tiny_model

SAMPLER = ClusterSampler(np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)


def generate(engine: Engine) -> torch.Tensor:
    config, layout = engine.model.config, engine.model.config.layout
    program = build_program(config, wavefront(layout, layout.given_frames, layout.generation_order, config.window_size))
    rng = np.random.default_rng(0)
    known = torch.from_numpy(rng.integers(tiny.NUM_CODES, size=(2, layout.num_slots)))
    uniforms = torch.from_numpy(rng.random((2, layout.num_slots, 2)))
    conditioning = Conditioning.from_tokens(
        [tiny.encode("left"), tiny.encode("up")], [], tiny.VOCABULARY.pad, guidance_scale=None, text_bonus=0.5
    )
    return engine.generate(program, known, conditioning, SAMPLER, uniforms)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_eager_and_cpu_sample_the_same_tokens(dtype: WeightName) -> None:
    tokens = []
    for name in ("eager", "cpu"):
        model = tiny.model("sequential", window_size=2)
        convert_weights(model, dtype)
        tokens.append(generate(Engine(model, name)))
    assert torch.equal(*tokens)
    assert len(tokens[0].unique()) > 10, "the test means nothing if all tokens are alike"


def test_auto_chooses_by_device() -> None:
    assert isinstance(open_backend("auto", tiny.model("image")), CpuBackend)
    assert type(open_backend("auto", tiny.model("image").to("meta"))) is EagerBackend


def test_backends_that_do_not_fit_are_refused() -> None:
    model = tiny.model("image")
    with pytest.raises(ValueError, match="backend=fast is not available; choose among auto, eager, cpu, compiled"):
        open_backend("fast", model)
    with pytest.raises(ValueError, match="backend=compiled does not run on cpu"):
        open_backend("compiled", model)
    with pytest.raises(ValueError, match="backend=cpu does not run on meta"):
        open_backend("cpu", model.to("meta"))


def test_without_kernels_auto_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {"eager": BACKENDS["eager"]})
    assert type(open_backend("auto", tiny.model("image"))) is EagerBackend
    with pytest.raises(ValueError, match=r"backend=cpu is not available; choose among auto, eager$"):
        open_backend("cpu", tiny.model("image"))


def test_the_backend_decides_about_the_kernels_of_linear_layers() -> None:
    """So an eager engine is PyTorch alone, whatever the model was used for before."""
    model = tiny_model(tiny_config())
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    install_kernels(model)
    assert all(linear.kernel is cpu.linear for linear in linears)
    assert model.layers[0].attention.implementation is ATTENTION["cpu"]
    open_backend("eager", model)
    assert all(linear.kernel is None for linear in linears)
    open_backend("cpu", model)
    assert all(linear.kernel is cpu.linear for linear in linears)


class NoGraphs:
    """Stands in for `Graphs`: runs the function of a key that first occurred, as a graph would, without a GPU."""

    def __init__(self, keys: list[Hashable]) -> None:
        self.keys = keys
        self._recorded: dict[Hashable, Callable[..., torch.Tensor]] = {}

    def run(self, key: Hashable, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        if key not in self._recorded:
            self.keys.append(key)
        return self._recorded.setdefault(key, function)(*inputs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.inference_mode()
def test_ten_prompts_are_compiled_in_few_shapes(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of ten lengths with guidance, by every schedule: one graph per padded length and number of rows.

    A second prompt of a padded length is decoded in the memory and by the graphs of the first.
    """
    torch._dynamo.reset()
    counter, recorded = CompileCounterWithBackend("eager"), list[Hashable]()
    monkeypatch.setattr(backends, "compile_layer", lambda layer: compile_layer(layer, counter))
    model = tiny_model(replace(tiny.CONFIG, task="interpolation", window_size=2, hidden_size=32))
    plain, compiled = Engine(model, "eager"), Engine(model, "eager")
    backend = compiled.backend = CompiledBackend(model)
    backend._new_graphs = partial(NoGraphs, recorded)  # type: ignore[assignment]
    compiled.scheduler = BatchScheduler(backend.decode)
    layout, rng = model.config.layout, np.random.default_rng(0)
    steps = SCHEDULES[schedule](layout, layout.given_frames, layout.generation_order[:1], 2)
    program = build_program(model.config, steps)
    for length in (1, 2, 5, 9, 15, 16, 17, 22, 30, 33):
        known = torch.from_numpy(rng.integers(tiny.NUM_CODES, size=(1, layout.num_slots)))
        uniforms = torch.from_numpy(rng.random((1, layout.num_slots, 2)))
        text = rng.integers(51, 151, size=length).tolist()
        conditioning = Conditioning.from_tokens(
            [text], [tiny.encode("any")], tiny.VOCABULARY.pad, guidance_scale=3.0, text_bonus=0.5
        )
        tokens = compiled.generate(program, known, conditioning, SAMPLER, uniforms)
        if length in (1, 16, 33):  # of each padded length
            assert torch.equal(tokens, plain.generate(program, known, conditioning, SAMPLER, uniforms))
    rows = {"sequential": {1}, "wavefront": {1}, "speculative": {1, 2, 4, 8, 16}}[schedule]
    assert {key[0] for key in recorded if isinstance(key, tuple)} <= rows
    assert len(recorded) == counter.frame_count <= 3 * len(rows)  # texts are padded to 16, 32 and 48
    assert len(compiled._kept) == 3
    torch._dynamo.reset()


@torch.inference_mode()
def test_a_step_that_draws_computes_nothing_outside_its_graph() -> None:
    """Its input tokens are taken inside; outside, a graph's own memory is filled with the slots."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class NoRun:
        def run(self, key: Hashable, function: object, *inputs: torch.Tensor) -> torch.Tensor:
            given.append(inputs)
            return torch.zeros(1, 1, dtype=torch.int64)

    seen, given = list[Any](), list[tuple[torch.Tensor, ...]]()
    model = tiny.model("sequential", window_size=2)
    backend, layout = CompiledBackend(model), model.config.layout
    backend._new_graphs = NoRun  # type: ignore[assignment]
    program = build_program(model.config, SCHEDULES["sequential"](layout, (0,), (1,), 2))
    kind = BatchKind(program, SAMPLER, None, 1, 5, layout.num_slots, torch.float64)
    state = ClipState.allocate(kind, KVCache.allocate(model.config, 1, 5), 0, torch.device("cpu"))
    with Counting():
        backend.decode([state.step(program.steps[0], draw=True)])
    of_result = {"aten.zeros.default", "aten.slice.Tensor", "aten.alias.default"}  # made by NoRun, and cut to its rows
    assert {str(func) for func in seen} <= of_result
    assert len(given) == 1 and given[0][0] is program.steps[0] and len(given[0]) == 1


@pytest.mark.parametrize(
    ("device", "has_flex", "chosen"), [("cpu", True, "cpu"), ("cuda", True, "flex"), ("cuda", False, "dense")]
)
def test_attention_is_chosen_by_device(
    device: str, has_flex: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "flex_is_available", lambda device, head_dim: has_flex)
    model = tiny_model(tiny_config())
    install_kernels(model, torch.device(device))
    assert model.layers[0].attention.implementation is ATTENTION[chosen]
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert all((linear.kernel is cpu.linear) == (device == "cpu") for linear in linears)
    install_kernels(model, torch.device(device), "sdpa")
    assert model.layers[0].attention.implementation is ATTENTION["sdpa"]


def test_attention_that_does_not_fit_is_refused() -> None:
    model = tiny_model(tiny_config())
    for attention, device in (("cpu", "cuda"), ("flex", "cpu")):  # flex: heads of 8 columns
        message = f"^attention={attention} is not available on {device} for heads of 8 columns; choose auto"
        with pytest.raises(ValueError, match=message):
            install_kernels(model, torch.device(device), attention)  # type: ignore[arg-type]


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler here")
def test_native_handles_live_as_long_as_their_cache() -> None:
    engine = Engine(tiny.model("sequential"), "cpu")
    backend = engine.backend
    assert isinstance(backend, CpuBackend)
    handles = []
    decode = backend.decode
    engine.scheduler._forward = lambda steps: (decode(steps), handles.append(len(backend._handles)))[0]  # type: ignore[func-returns-value]
    generate(engine)
    assert set(handles) == {1}
    gc.collect()
    assert len(backend._handles) == 0


def test_forward_passes_are_counted() -> None:
    engine = Engine(tiny.model("sequential", window_size=2))
    generate(engine)
    assert engine.prefill_passes == 1
    steps = 16 + 3 * (2 - 1) * (4 + 1)  # each of four frames starts five steps after the one before
    assert engine.forward_passes == 1 + steps
