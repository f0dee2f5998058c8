"""The chunked loss, with gradients computed in the forward or the backward pass, against plain cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.model import loss
from cogvideo.model.loss import token_nll


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weights, targets, and a weight for each row's loss."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=dtype, generator=generator) for n in (13, 30))
    return hidden, weight, torch.randint(30, (13,), generator=generator), torch.rand(13, generator=generator)


@pytest.mark.parametrize("max_logits", [1, 30 * 5, 30 * 8 * 4, 10**6])
@pytest.mark.parametrize("trainable", [(True, False), (False, True), (True, True), (False, False)])
def test_chunks_equal_the_loss_of_all_rows(
    max_logits: int, trainable: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "MAX_LOGITS", max_logits)
    hidden, weight, targets, row_weight = case()
    expected_leaves = [x.clone().requires_grad_(on) for x, on in zip((hidden, weight), trainable, strict=True)]
    leaves = [x.clone().requires_grad_(on) for x, on in zip((hidden, weight), trainable, strict=True)]
    expected = F.cross_entropy(F.linear(*expected_leaves), targets, reduction="none")
    got = token_nll(*leaves, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    if any(trainable):
        (expected * row_weight).sum().backward()
        (got * row_weight).sum().backward()
    for mine, other in zip(leaves, expected_leaves, strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_weights_in_bfloat16_are_close(autocast: bool) -> None:
    hidden, weight, targets, row_weight = case(torch.float32)
    exact = hidden.clone().requires_grad_()
    (F.cross_entropy(F.linear(exact, weight), targets, reduction="none") * row_weight).sum().backward()
    rough = (hidden if autocast else hidden.bfloat16()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = token_nll(rough, weight if autocast else weight.bfloat16(), targets)
    (losses * row_weight).sum().backward()
    assert losses.dtype == torch.float32
    assert rough.grad is not None
    assert rough.grad.dtype == rough.dtype
    torch.testing.assert_close(rough.grad.float(), exact.grad, atol=0.05, rtol=0.05)
