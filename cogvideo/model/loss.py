"""Cross-entropy of image tokens from hidden states, a chunk of rows at a time. transformer.py chooses the rows.

With frozen output weights a row's gradient depends only on its own logits, so the forward pass computes it as well: no
logits are kept and none are computed twice. Trainable output weights need the logits again in the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 40_000_000
"""Logits in memory at once: 160 MB in float32, and as much again for their gradient."""
FROZEN_FRACTION = 8
"""With frozen output weights, MAX_LOGITS is divided by this: logits stay in a CPU's cache between two products."""


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each row's target, float32 for hidden states of any dtype.

    Shapes: hidden (rows, hidden), weight (image tokens, hidden), targets (rows,) -> (rows,).
    """
    rows = max(1, MAX_LOGITS // len(weight))
    chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return torch.cat([_nll(h, weight, t) for h, t in chunks])
    if not weight.requires_grad:
        losses: Tensor = _FrozenOutputLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
        return losses
    if len(chunks) == 1:
        return _nll(hidden, weight, targets)
    return torch.cat([checkpoint(_nll, h, weight, t, use_reentrant=False) for h, t in chunks])


def _nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


class _FrozenOutputLoss(torch.autograd.Function):
    """Computes each hidden state's gradient, (softmax - one hot) @ weight, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = hidden.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            weight = weight.to(torch.get_autocast_dtype(kind))  # once, not in every chunk
        rows = max(1, MAX_LOGITS // FROZEN_FRACTION // len(weight))
        losses, gradient = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            target = targets[chunk, None]
            log_probs = F.linear(hidden[chunk], weight).float().log_softmax(-1)
            losses[chunk] = -log_probs.gather(1, target)[:, 0]
            # in place: softmax - one hot
            d_logits = log_probs.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=log_probs.dtype))
            gradient[chunk] = d_logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None
