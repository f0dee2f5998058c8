"""Training beside a frozen trunk in int8: as beside the weights that it stands for, and no wide copy is kept."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cogvideo.model.config import Recompute
from cogvideo.model.quantize import Embedding, Linear
from cogvideo.model.transformer import CogVideoTransformer, is_temporal
from cogvideo.sequence.batch import Batch
from tests.helpers.models import VARIANTS, tiny_batch, tiny_config, tiny_model

TYPES = ("fp32", "autocast", "bf16_weights")


def matrices(module: nn.Module) -> Iterator[Linear | Embedding]:
    """Those held in int8."""
    return (m for m in module.modules() if isinstance(m, Linear | Embedding) and m.weight_scale is not None)


@torch.no_grad()
def widen(module: nn.Module) -> None:
    """Float32 weights of the same values."""
    for matrix in list(matrices(module)):
        assert matrix.weight_scale is not None
        wide = matrix.weight * matrix.weight_scale[:, None]
        matrix.weight_scale = None
        matrix.weight = nn.Parameter(wide, requires_grad=False)


def pair(variant: str = "sequential", **changes: float) -> tuple[CogVideoTransformer, CogVideoTransformer]:
    """Two equal models but that one's trunk is int8 and the other's is what that stands for."""
    config = tiny_config(**VARIANTS[variant] | changes)
    narrow, wide = tiny_model(config).train(), tiny_model(config).train()
    for model in (narrow, wide):
        model.freeze_trunk()
        model.narrow_trunk()
    widen(wide)
    return narrow, wide


def learn(model: CogVideoTransformer, batch: Batch, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and the gradient of everything that learns."""
    if kind == "bf16_weights":
        model.bfloat16()
    torch.manual_seed(0)  # dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        losses = model.token_losses(batch)
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("variant", ["sequential", "interpolation"])
def test_losses_and_gradients_are_those_beside_the_widened_weights(variant: str, kind: str) -> None:
    narrow, wide = pair(variant)
    batch = tiny_batch(narrow.config)
    (losses, gradients), (expected, expected_gradients) = (learn(model, batch, kind) for model in (narrow, wide))
    close = {"atol": 1e-6, "rtol": 1e-5} if kind == "fp32" else {"atol": 1e-3, "rtol": 1e-2}
    torch.testing.assert_close(losses, expected, **close)
    learned = {name for name, _ in narrow.added_parameters()}
    assert gradients.keys() == expected_gradients.keys() == learned
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], **close)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("what", ["mlp", "layer"])
@pytest.mark.parametrize("kind", ["fp32", "autocast"])
def test_recomputing_changes_nothing(what: Recompute, kind: str) -> None:
    kept, again = (pair("interpolation", dropout=0.2, attention_dropout=0.2)[0] for _ in range(2))
    again.recompute = what
    batch = tiny_batch(kept.config)
    (losses, gradients), (expected, expected_gradients) = (learn(model, batch, kind) for model in (again, kept))
    torch.testing.assert_close(losses, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_autograd_keeps_int8_alone(kind: str) -> None:
    linear = Linear(37, 21)
    linear.requires_grad_(False).narrow()
    if kind == "bf16_weights":
        linear.bfloat16()
    x = torch.randn(2, 3, 37, dtype=torch.bfloat16 if kind == "bf16_weights" else torch.float32, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = linear(x)
    assert {(t.dtype, t.shape) for t in kept} == {(torch.int8, (21, 37)), (torch.float32, (21,))}
    assert y.dtype == (torch.float32 if kind == "fp32" else torch.bfloat16)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype and linear.weight_scale is not None
    wide = linear.weight * linear.weight_scale[:, None]
    torch.testing.assert_close(x.grad.float(), wide.sum(0).expand(2, 3, 37), atol=2e-2, rtol=2e-2)


def test_the_trunks_matrices_are_int8_and_nothing_else() -> None:
    model, _ = pair()
    held = {name for name, p in model.named_parameters() if p.dtype == torch.int8}
    parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    of_layers = {f"layers.{i}.{part}.weight" for i in range(model.config.num_layers) for part in parts}
    assert held == of_layers | {"word_embeddings.weight"} and not any(map(is_temporal, held))
    with pytest.raises(RuntimeError, match="floating point"):
        model.freeze_trunk(False)


def test_scales_stay_float32_where_all_else_is_bfloat16() -> None:
    model, wide = pair()
    scales = [matrix.weight_scale for matrix in matrices(model)]
    model.bfloat16()
    assert model.layers[0].mlp.dense_h_to_4h.bias.dtype == torch.bfloat16
    for before, matrix in zip(scales, matrices(model), strict=True):
        assert before is not None and matrix.weight_scale is not None and torch.equal(before, matrix.weight_scale)
    rows, expected = model.word_embeddings(torch.arange(5)), wide.word_embeddings(torch.arange(5))
    assert torch.equal(rows, expected)
