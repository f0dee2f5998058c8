"""Products of a few rows with weights of every type, against plain matrix products."""

import pytest
import torch
import torch.nn.functional as F

from cogvideo.kernels import cpu as few_rows
from cogvideo.model.quantize import Embedding, Linear, convert_weights

needs_kernels = pytest.mark.skipif(few_rows.library() is None, reason="no C++ compiler here: PyTorch's products serve")


def layer(ins: int = 37, outs: int = 21) -> Linear:
    torch.manual_seed(0)
    return Linear(ins, outs).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 32, 40])
def test_product_is_that_of_the_stored_weights(dtype: str, rows: int) -> None:
    linear = layer()
    convert_weights(linear, dtype)  # type: ignore[arg-type]
    stored = linear.weight.double()
    if linear.weight_scale is not None:
        stored = stored * linear.weight_scale[:, None].double()
    x = torch.randn(rows, 37)
    expected = F.linear(x.double(), stored, linear.bias.double())
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-5, rtol=1e-5)


@needs_kernels
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others() -> None:
    linear, x = layer(), torch.randn(9, 37)
    assert all(torch.equal(linear(x[i : i + 1])[0], linear(x)[i]) for i in range(9))


@torch.no_grad()
@pytest.mark.parametrize(("ins", "groups"), [(128, 2), (38, 1)])
def test_int4_is_within_half_a_step(ins: int, groups: int) -> None:
    linear, x = layer(ins), torch.randn(3, ins)
    before = linear.weight.clone()
    convert_weights(linear, "int4")
    assert linear.weight.dtype == torch.uint8 and linear.weight.shape == (21, ins // 2)
    assert linear.weight_scale is not None and linear.weight_scale.shape == (21, groups)
    wide = linear(torch.eye(ins)).T - linear.bias[:, None]
    step = linear.weight_scale.repeat_interleave(ins // groups, dim=1)
    assert ((wide - before).abs() <= step * 0.5001 + 1e-6).all()
    torch.testing.assert_close(linear(x), F.linear(x, wide, linear.bias), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="int4 already"):
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
    with pytest.raises(ValueError, match="int8 already"):
        convert_weights(linear, "bf16")


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_table_gives_and_scores_the_same_rows(dtype: str) -> None:
    torch.manual_seed(0)
    table = Embedding(30, 16)
    convert_weights(table, dtype)  # type: ignore[arg-type]
    rows, hidden = table(torch.arange(30)), torch.randn(3, 16)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(table.scores(hidden, 20), hidden @ rows[:20].T, atol=1e-5, rtol=1e-5)


def test_gradients_go_by_plain_products() -> None:
    linear, x = layer(), torch.randn(2, 37)
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(21, 37))
