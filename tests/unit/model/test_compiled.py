"""Compiled layers: one graph without breaks, the same losses and gradients, and how often they are compiled."""

import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex

from cogvideo.kernels import (
    cpu,
    tiled_attention,  # noqa: F401  (adds itself to ATTENTION)
)
from cogvideo.model import compiled, joined
from cogvideo.model.compiled import check_compiler, compile_static
from cogvideo.model.config import LoraConfig, Recompute
from cogvideo.model.lora import adapter_parameters, add_adapters
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import Batch
from tests.helpers.adapters import randomise
from tests.helpers.models import VARIANTS, tiny_batch, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has no backward kernel for a CPU and refuses; its unfused form has a backward pass."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(joined, "_has_kernel", lambda *inputs: True)


def losses_and_gradients(model: CogVideoTransformer, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    losses = model.token_losses(batch)
    losses.mean().backward()
    return {"losses": losses.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_training(model: CogVideoTransformer, backend: str, attention: str = "flex") -> int:
    """Compare compiled layers with others over two steps; returns the number of compiled graphs."""
    model.train()
    batch = tiny_batch(model.config, 3)
    model.use_attention("sdpa")
    expected = losses_and_gradients(model, batch)
    model.use_attention(attention)
    counter = CompileCounterWithBackend(backend)
    model.compile_layers(counter)
    for _ in range(2):
        got = losses_and_gradients(model, batch)
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4)
    return counter.frame_count


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "recompute", "trunk"),
    [
        ("sequential", "mlp", "frozen"),
        ("interpolation", "layer", "int8"),
        ("interpolation", "nothing", "full"),
        pytest.param("sequential", "nothing", "frozen", marks=SLOW),
        pytest.param("sequential", "nothing", "int8", marks=SLOW),
        pytest.param("sequential", "layer", "full", marks=SLOW),
        pytest.param("interpolation", "mlp", "int8", marks=SLOW),
        pytest.param("interpolation", "mlp", "full", marks=SLOW),
        pytest.param("interpolation", "layer", "frozen", marks=SLOW),
        pytest.param("image", "mlp", "full", marks=SLOW),
        pytest.param("image", "layer", "full", marks=SLOW),
    ],
)
def test_a_training_step_has_one_graph_for_all_layers_but_the_last(
    variant: str, recompute: Recompute, trunk: str
) -> None:
    """Shifted windows have the graph of others. In the last layer only supervised rows are queries, and text stays."""
    model = tiny_model(tiny_config(**VARIANTS[variant], num_layers=5, hidden_size=16))
    model.recompute = recompute
    model.freeze_trunk(trunk != "full")
    if trunk == "int8":
        model.quantize_trunk()
    assert check_training(model, "eager") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "targets", "graphs"),
    [("full", ("spatial", "temporal", "mlp", "embeddings"), 2), ("int8", (), 3)],
)
def test_adapters_are_compiled_with_the_layers(trunk: str, targets: tuple[str, ...], graphs: int) -> None:
    """Without adapters beside the embeddings no gradient goes before the first layer, which then has its own graph."""
    model = tiny_model(tiny_config("sequential", num_layers=4, hidden_size=16))
    model.requires_grad_(False)
    if trunk == "int8":
        model.quantize_trunk()
    add_adapters(model, LoraConfig(rank=2, alpha=4.0, targets=targets))
    randomise(model)
    model.recompute = "mlp"
    assert check_training(model, "eager") == graphs
    trained = dict(adapter_parameters(model))
    assert trained and all(p.grad is not None and p.grad.any() for p in trained.values())


def test_forty_eight_layers_have_the_graphs_of_two() -> None:
    model = tiny_model(tiny_config("interpolation", window_size=2, num_layers=48, hidden_size=8))
    model.freeze_trunk()
    assert check_training(model, "eager", "dense") == 2


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "cpu", "dense"])
def test_every_attention_compiles(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvideo.model.plan._TILE_FROM_KEYS", 1)
    model = tiny_model(tiny_config("interpolation", window_size=2, num_layers=4))
    assert check_training(model, "eager", attention) <= 3  # in blocks and tiles, shifted windows have their own graph


@pytest.mark.slow
@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler here")
def test_inductor_trains_alike() -> None:
    """Inductor compiles what AOTAutograd traces, which the next test does for all that can be recomputed."""
    model = tiny_model(tiny_config("interpolation", window_size=2, num_layers=3))
    model.recompute = "mlp"
    model.freeze_trunk()
    assert check_training(model, "inductor", "dense") == 2


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layer"])
def test_flex_attention_and_its_gradient_trace_as_one_graph_each(recompute: Recompute) -> None:
    """AOTAutograd traces forward and backward, as for a GPU, and runs both."""
    model = tiny_model(tiny_config("interpolation", window_size=2, num_layers=3, hidden_size=64))
    model.recompute = recompute
    model.freeze_trunk()
    assert check_training(model, "aot_eager") == 2


def test_texts_of_all_lengths_are_compiled_in_few_shapes() -> None:
    config = tiny_config("sequential", text_len=40, num_positions=64, frame_position_start=40, num_layers=2)
    model = tiny_model(config).train()
    model.use_attention("dense")
    counter = CompileCounterWithBackend("eager")
    model.compile_layers(counter)
    whole = tiny_batch(config, 2)
    for length in (40, 3, 16, 17, 25, 31, 33, 8, 1, 39):
        mask = torch.zeros_like(whole.text_mask)
        mask[:, -length:] = True
        batch = Batch(whole.text, mask, whole.frames, whole.seconds).trim_text(16)
        model.token_losses(batch).mean().backward()
    assert counter.frame_count == 2 * 3  # of 16, 32 and 40 tokens, which is all that the model has


def test_scoring_runs_as_before() -> None:
    model = tiny_model(tiny_config())
    counter = CompileCounterWithBackend("eager")
    model.compile_layers(counter)
    model.token_losses(tiny_batch(model.config))
    assert counter.frame_count == 0


def test_more_shapes_than_pytorch_allows_by_itself() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    counter = CompileCounterWithBackend("eager")
    function = compile_static(double, counter)
    for size in range(2, 14):
        assert function(torch.ones(size)).sum() == 2 * size
    assert counter.frame_count == 12


def test_threads_share_the_limit() -> None:
    """PyTorch's options are per thread: one that compiled nothing yet has the default, for shapes of others too."""
    function, sums = compile_static(lambda x: x * 2, "eager"), list[float]()

    def call(size: int) -> None:
        sums.append(function(torch.ones(size)).sum().item())

    for size in range(2, 14):
        thread = threading.Thread(target=call, args=(size,))
        thread.start()
        thread.join()
    assert sums == [2 * size for size in range(2, 14)]


def test_nothing_falls_back_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor) -> Tensor:
        return x * float(np.random.default_rng(int(x.sum())).random())

    with pytest.raises(Unsupported):
        compile_static(broken, "eager")(torch.ones(2))
    monkeypatch.setattr(compiled, "RECOMPILE_LIMIT", 2)
    with torch._dynamo.config.patch(recompile_limit=2):  # not monkeypatch, which deletes the option afterwards
        function = compile_static(lambda x: x + 1, "eager")
        function(torch.ones(2))
        function(torch.ones(3))
        with pytest.raises(FailOnRecompileLimitHit):
            function(torch.ones(4))


def test_a_missing_compiler_is_said() -> None:
    with pytest.raises(
        ValueError, match=re.escape("torch.compile needs Triton on cuda; install it, or set train.compile=false")
    ):
        check_compiler(torch.device("cuda"))
    message = r"torch.compile needs a C\+\+ compiler on a CPU; install g\+\+"
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ValueError, match=message),
    ):
        check_compiler(torch.device("cpu"))
