"""AdamW for training: parameter groups, the learning-rate schedule, updates that can be vetoed, averaged weights."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo.training.config import OptimiserConfig

EMA = "ema"
"""Key of a parameter's moving average in the optimiser state, beside those of AdamW's moments."""
SPIKE_WINDOW, MIN_NORMS = 64, 16
"""Largest and smallest number of earlier norms that a step's norm is compared with."""


def learning_rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """The rate at 0-based `step` of `steps`: linear warmup, then as config.schedule says, down to lr * min_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    low = config.lr * config.min_lr_ratio
    if config.schedule == "wsd":
        falling = max(1.0, min(config.decay_fraction * steps, steps - config.warmup_steps))
        return low + (config.lr - low) * min(1.0, max(0, steps - step) / falling)
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay_after(updates: int, decay: float) -> float:
    """The average's decay in the update that follows `updates` others: the usual min(decay, (1 + n) / (10 + n)), low at
    first so that the starting weights are soon forgotten."""
    return min(decay, (1 + updates) / (10 + updates))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices (embeddings too, as published) decay, vectors do not.

    Vectors are LayerNorm scales, biases and mixing logits; decaying LayerNorm scales and biases shrinks activations
    without regularizing.
    Raises: ValueError if nothing is trainable.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing left to train: every parameter is frozen; set init.freeze_trunk=false")
    groups = [
        {"params": [p for p in trainable if len(full_shape(p)) > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if len(full_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def full_shape(p: Tensor) -> tuple[int, ...]:
    """A parameter's shape, even where ZeRO 3 has left an empty tensor in its place."""
    return tuple(getattr(p, "ds_shape", p.shape))


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose updates can be vetoed: if `allow_update` returns False, weights and moments stay as they are.

    DeepSpeed calls `step` deep inside its own `engine.step()`, after gradients are reduced, unscaled and clipped. It is
    the last place where an update can still be stopped, and the first where the final gradients exist.
    """

    allow_update: Callable[["GuardedAdamW"], bool] | None = None
    ema_decay: float | None = None
    """Decay of the moving average of weights in this step; None: there is no average."""

    def step(self, closure: Any = None) -> Any:
        if self.allow_update is not None and not self.allow_update(self):
            return None
        result = super().step(closure)
        updated = [p for group in self.param_groups for p in group["params"]]
        if self.ema_decay is not None and updated:
            with torch.no_grad():
                torch._foreach_lerp_([self.state[p][EMA] for p in updated], updated, 1 - self.ema_decay)
        return result


def make_optimiser(module: nn.Module, config: OptimiserConfig) -> GuardedAdamW:
    """AdamW over the trainable parameters; fused, which is seven times as fast on a CPU and needs no compiler."""
    groups = parameter_groups(module, config.weight_decay)
    return GuardedAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class SpikeRule:
    """Which gradient norms are spikes: above `factor` times the median of the last SPIKE_WINDOW, if there are enough.

    Norms of skipped steps count as well: a rise that lasts becomes the median, after at most half the window.
    """

    def __init__(self, factor: float | None) -> None:
        """`factor`: as train.skip_spikes; None: nothing is a spike."""
        self._factor = factor
        self.norms: list[float] = []
        """The last norms, oldest first; empty without a factor."""

    @property
    def limit(self) -> float:
        """The largest norm that the next step can have without being a spike."""
        if self._factor is None or len(self.norms) < MIN_NORMS:
            return math.inf
        return self._factor * statistics.median(self.norms)

    def is_spike(self, norm: float | None) -> bool:
        """Whether to skip a step with this gradient norm; None: not reported."""
        return norm is not None and float(norm) > self.limit

    def add(self, norm: float) -> None:
        """Add the norm of a step to those that later ones are compared with; a non-finite one is ignored."""
        if self._factor is not None and is_finite_norm(norm):
            self.norms = [*self.norms, norm][-SPIKE_WINDOW:]


def is_finite_norm(norm: float | None) -> bool:
    """Whether a gradient norm is finite. DeepSpeed reports NaN and infinity as -1 in places; None: not reported."""
    return norm is None or (math.isfinite(norm) and norm >= 0)
