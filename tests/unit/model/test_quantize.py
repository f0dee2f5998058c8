"""Weights of every storage type against plain matrix products, and training beside an int8 trunk.

That is as beside the weights that it stands for, and autograd keeps no dequantized copy.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.dtypes import QuantizedName, WeightName
from cogvideo.model.config import Recompute
from cogvideo.model.quantize import (
    Embedding,
    Float8Linear,
    Linear,
    convert_weights,
    scaled_product,
    set_linear_kernel,
)
from cogvideo.model.transformer import CogVideoTransformer, is_temporal
from cogvideo.sequence.batch import Batch
from tests.helpers.models import VARIANTS, tiny_batch, tiny_config, tiny_model

TYPES = ("fp32", "autocast", "bf16_weights")


def layer(in_features: int = 37, out_features: int = 21) -> Linear:
    torch.manual_seed(0)
    return Linear(in_features, out_features).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8", "float8"])
def test_product_is_that_of_the_stored_weights(dtype: WeightName) -> None:
    linear = layer()
    convert_weights(linear, dtype)
    stored = linear.weight.double()
    if linear.weight_scale is not None:
        stored = stored * linear.weight_scale[:, None].double()
    x = torch.randn(3, 37)
    expected = F.linear(x.double(), stored, linear.bias.double())
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_sums_is_as_exact_as_scaling_the_matrix(dtype: torch.dtype, weights: WeightName) -> None:
    """What a GPU computes of a weight of one byte, against the exact product, and against dequantizing in that type."""
    linear = layer(512, 96)
    convert_weights(linear, weights, activations=dtype)
    assert linear.weight_scale is not None
    x = torch.randn(5, 512).to(dtype)
    exact = F.linear(x.double(), linear.weight.double() * linear.weight_scale.double()[:, None], linear.bias.double())
    scaled = scaled_product(x, linear.weight, linear.weight_scale, linear.bias)
    assert scaled.dtype == dtype
    with torch.enable_grad():
        dequantized = linear(x)
    errors = [float((y.double() - exact).abs().mean()) for y in (scaled, dequantized)]
    assert errors[0] < 1.25 * errors[1] + 1e-7
    torch.testing.assert_close(scaled.double(), exact, atol=8 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


@torch.no_grad()
@pytest.mark.parametrize(("in_features", "groups"), [(128, 2), (38, 1)])
def test_int4_is_within_half_a_step(in_features: int, groups: int) -> None:
    linear, x = layer(in_features), torch.randn(3, in_features)
    before = linear.weight.clone()
    convert_weights(linear, "int4")
    assert linear.weight.dtype == torch.uint8 and linear.weight.shape == (21, in_features // 2)
    assert linear.weight_scale is not None and linear.weight_scale.shape == (21, groups)
    dequantized = linear(torch.eye(in_features)).T - linear.bias[:, None]
    step = linear.weight_scale.repeat_interleave(in_features // groups, dim=1)
    assert ((dequantized - before).abs() <= step * 0.5001 + 1e-6).all()
    torch.testing.assert_close(linear(x), F.linear(x, dequantized, linear.bias), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="already int4"):
        convert_weights(linear, "int8")


@torch.no_grad()
def test_int8_is_within_half_a_step() -> None:
    linear = layer()
    before = linear.weight.clone()
    convert_weights(linear, "int8")
    assert linear.weight.dtype == torch.int8 and linear.weight_scale is not None
    error = (linear.weight * linear.weight_scale[:, None] - before).abs()
    assert (error <= linear.weight_scale[:, None] * 0.5001).all()
    convert_weights(linear, "int8")
    with pytest.raises(ValueError, match="already int8"):
        convert_weights(linear, "bf16")


@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_float8_is_within_half_of_its_last_digit(size: float) -> None:
    """Of 3 binary digits, or of those of small numbers; the largest number of each row is exact."""
    linear = layer()
    linear.weight.mul_(size)
    linear.weight[3] = 0.0
    before = linear.weight.double()
    convert_weights(linear, "float8")
    assert linear.weight.dtype == torch.float8_e4m3fn and linear.weight_scale is not None
    scale = linear.weight_scale.double()[:, None]
    error = (linear.weight.double() * scale - before).abs()
    assert (error <= 1.0001 * torch.maximum(before.abs() * 2**-4, scale * 2**-10)).all()
    largest = before.abs().argmax(1, keepdim=True)
    assert error.gather(1, largest).max() <= 1e-6 * size
    convert_weights(linear, "float8")
    with pytest.raises(ValueError, match="already float8"):
        convert_weights(linear, "int8")


def test_float8_stays_what_it_is_where_floats_are_cast() -> None:
    """DeepSpeed casts all floating-point parameters; in bfloat16 this one would lose its scale's meaning and memory."""
    linear = layer()
    convert_weights(linear, "float8")
    before, scale = linear.weight.view(torch.uint8).clone(), linear.weight_scale
    assert scale is not None
    for cast in (linear.bfloat16, linear.half, linear.float, lambda: linear.to(torch.float64)):
        cast()
        assert linear.weight.dtype == torch.float8_e4m3fn and torch.equal(linear.weight.view(torch.uint8), before)
        assert linear.weight_scale is not None and torch.equal(linear.weight_scale, scale)
    assert linear.bias.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_products_are_those_of_rounded_rows(dtype: torch.dtype) -> None:
    """Against products in float64 of what inputs, weights and gradients are rounded to, and close to the unrounded."""
    linear = layer(64, 48)
    linear.requires_grad_(False).quantize("float8")
    scale = linear.weight_scale
    assert scale is not None

    def rounded(x: Tensor) -> Tensor:
        row_scale = x.detach().float().abs().amax(-1, keepdim=True) / 448
        return (x.float() / row_scale).to(torch.float8_e4m3fn).double() * row_scale.double()

    x = (torch.randn(2, 3, 64) * torch.tensor([1e-4, 1.0, 1e4])[:, None]).to(dtype).requires_grad_()
    gradient = torch.randn(2, 3, 48).to(dtype)
    y = Float8Linear.apply(x, linear.weight, scale, linear.bias)
    y.backward(gradient)
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    weight = linear.weight.double() * scale.double()[:, None]

    def check(found: Tensor, expected: Tensor) -> None:
        """Row by row, for their sizes differ."""
        for row, expected_row in zip(found.double().flatten(0, 1), expected.flatten(0, 1), strict=True):
            assert (row - expected_row).abs().max() <= 4 * torch.finfo(dtype).eps * expected_row.abs().max()

    check(y.detach(), rounded(x) @ weight.T + linear.bias.double())
    check(x.grad, rounded(gradient * scale) @ linear.weight.double())
    plain = gradient.double() @ weight
    assert (x.grad.double() - plain).norm() < 0.04 * plain.norm()


def test_float8_products_of_no_numbers_are_zero_or_no_numbers() -> None:
    linear = layer(64, 48)
    linear.requires_grad_(False).quantize("float8")
    x = torch.zeros(3, 64)
    x[1, 0], x[2, 0] = float("nan"), float("inf")
    y = Float8Linear.apply(x, linear.weight, linear.weight_scale, torch.zeros(48))
    assert (y[0] == 0).all() and not y[1:].isfinite().any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bf16", "int8", "float8", "int4"])
def test_an_embedding_and_its_logits_use_the_same_rows(dtype: WeightName) -> None:
    torch.manual_seed(0)
    table = Embedding(30, 16)
    convert_weights(table, dtype)
    rows, hidden = table(torch.arange(30)), torch.randn(3, 16)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(table.logits(hidden, 20), hidden @ rows[:20].T, atol=1e-5, rtol=1e-5)


def test_kernels_are_not_used_with_gradients() -> None:
    linear, x = layer(), torch.randn(2, 37)
    set_linear_kernel(linear, lambda x, weight, bias, scale: torch.full((2, 21), 7.0))
    with torch.no_grad():
        assert (linear(x) == 7).all()
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(21, 37))


def matrices(module: nn.Module) -> Iterator[Linear | Embedding]:
    """The int8 ones."""
    return (m for m in module.modules() if isinstance(m, Linear | Embedding) and m.weight_scale is not None)


@torch.no_grad()
def dequantize(module: nn.Module) -> None:
    """Replace int8 weights by float32 ones of the same values."""
    for matrix in list(matrices(module)):
        assert matrix.weight_scale is not None
        values = matrix.weight.float() * matrix.weight_scale[:, None]
        matrix.weight_scale = None
        matrix.weight = nn.Parameter(values, requires_grad=False)


def pair(
    variant: str = "sequential", stored: QuantizedName = "int8", **changes: float
) -> tuple[CogVideoTransformer, CogVideoTransformer]:
    """Two models, one with a quantized trunk, the other with float32 weights of the same values."""
    config = tiny_config(**VARIANTS[variant] | changes)
    quantized, full = tiny_model(config).train(), tiny_model(config).train()
    for model in (quantized, full):
        model.freeze_trunk()
        model.quantize_trunk(stored)
    dequantize(full)
    return quantized, full


def gradients_of(model: CogVideoTransformer, batch: Batch, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and the gradients of all trainable parameters."""
    if kind == "bf16_weights":
        model.bfloat16()
    torch.manual_seed(0)  # dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        losses = model.token_losses(batch)
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("variant", "stored"), [("sequential", "int8"), ("interpolation", "int8"), ("sequential", "float8")]
)
def test_training_beside_a_quantized_trunk_is_as_beside_dequantized_weights(
    variant: str, stored: QuantizedName, kind: str
) -> None:
    quantized, full = pair(variant, stored)
    batch = tiny_batch(quantized.config)
    (losses, gradients), (expected, expected_gradients) = (
        gradients_of(model, batch, kind) for model in (quantized, full)
    )
    close = {"atol": 1e-6, "rtol": 1e-5} if kind == "fp32" else {"atol": 1e-3, "rtol": 1e-2}
    torch.testing.assert_close(losses, expected, **close)
    learned = {name for name, _ in quantized.extra_parameters()}
    assert gradients.keys() == expected_gradients.keys() == learned
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], **close)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("what", ["mlp", "layer"])
@pytest.mark.parametrize("kind", ["fp32", "autocast"])
def test_recomputing_beside_an_int8_trunk_changes_no_gradient(what: Recompute, kind: str) -> None:
    plain, recomputed = (pair("interpolation", dropout=0.2, attention_dropout=0.2)[0] for _ in range(2))
    recomputed.recompute = what
    batch = tiny_batch(plain.config)
    (losses, gradients), (expected, expected_gradients) = (
        gradients_of(model, batch, kind) for model in (recomputed, plain)
    )
    torch.testing.assert_close(losses, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_autograd_saves_the_int8_weight_only(kind: str) -> None:
    linear = Linear(37, 21)
    linear.requires_grad_(False).quantize()
    if kind == "bf16_weights":
        linear.bfloat16()
    x = torch.randn(2, 3, 37, dtype=torch.bfloat16 if kind == "bf16_weights" else torch.float32, requires_grad=True)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = linear(x)
    assert {(t.dtype, t.shape) for t in saved} == {(torch.int8, (21, 37)), (torch.float32, (21,))}
    assert y.dtype == (torch.float32 if kind == "fp32" else torch.bfloat16)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype and linear.weight_scale is not None
    dequantized = linear.weight * linear.weight_scale[:, None]
    torch.testing.assert_close(x.grad.float(), dequantized.sum(0).expand(2, 3, 37), atol=2e-2, rtol=2e-2)


def test_quantize_trunk_changes_the_trunks_matrices_only() -> None:
    model, _ = pair()
    quantized = {name for name, p in model.named_parameters() if p.dtype == torch.int8}
    parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    of_layers = {f"layers.{i}.{part}.weight" for i in range(model.config.num_layers) for part in parts}
    assert quantized == of_layers | {"word_embeddings.weight"} and not any(map(is_temporal, quantized))
    with pytest.raises(RuntimeError, match="floating point"):
        model.freeze_trunk(False)


def test_scales_stay_float32_when_the_model_becomes_bfloat16() -> None:
    model, full = pair()
    scales = [matrix.weight_scale for matrix in matrices(model)]
    model.bfloat16()
    assert model.layers[0].mlp.dense_h_to_4h.bias.dtype == torch.bfloat16
    for before, matrix in zip(scales, matrices(model), strict=True):
        assert before is not None and matrix.weight_scale is not None and torch.equal(before, matrix.weight_scale)
    rows, expected = model.word_embeddings(torch.arange(5)), full.word_embeddings(torch.arange(5))
    assert torch.equal(rows, expected)
