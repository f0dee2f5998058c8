"""Cross-entropy of image tokens from hidden states, a chunk of rows at a time. Not which rows count: transformer.py.

While the output weights are frozen, a row's gradient follows from its own logits, so it is made right when they are
there: no logits are kept and none are computed twice. Weights that learn need the logits again in the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 40_000_000
"""Numbers in the logits alive at once: 160 MB of them in float32, and as much again of their gradient."""
FROZEN_PART = 8
"""Where output weights are frozen, this part of them at once: scores stay in a CPU's cache between two products."""


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each row's target, float32 whatever the hidden states are.

    Shapes: hidden (rows, hidden), weight (image tokens, hidden), targets (rows,) -> (rows,).
    """
    rows = max(1, LOGITS_AT_ONCE // len(weight))
    chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return torch.cat([_nll(h, weight, t) for h, t in chunks])
    if not weight.requires_grad:
        losses: Tensor = _FrozenOutput.apply(hidden, weight, targets)
        return losses
    if len(chunks) == 1:
        return _nll(hidden, weight, targets)
    return torch.cat([checkpoint(_nll, h, weight, t, use_reentrant=False) for h, t in chunks])


def _nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


class _FrozenOutput(torch.autograd.Function):
    """The gradient of row i's loss by its hidden state, (softmax - one hot) @ weight, is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(torch.get_autocast_dtype(hidden.device.type))  # once, not in every chunk
        rows = max(1, LOGITS_AT_ONCE // FROZEN_PART // len(weight))
        losses, gradient = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            scores = F.linear(hidden[part], weight).float().log_softmax(-1)
            losses[part] = -scores.gather(1, target)[:, 0]
            scores = scores.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=scores.dtype))
            gradient[part] = scores.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None
