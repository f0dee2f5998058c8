"""Which parameters decay, and the learning rate of every step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cogvideo.training.config import OptimiserConfig


def learning_rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """The rate of 0-based `step` of `steps`: a linear rise, then a cosine down to lr * min_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    part = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * part))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices (embeddings too, as published) decay; vectors do not.

    Vectors are LayerNorms, biases and mixing logits: decay would pull a scale towards silence, not towards simplicity.
    """
    learned = [p for p in module.parameters() if p.requires_grad]
    if not learned:
        raise ValueError("nothing is left to learn: every parameter is frozen; set init.freeze_trunk=false")
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that asks before each update, so that a bad step leaves weights and moments alone.

    DeepSpeed calls `step` deep inside its own, once all gradients are reduced, unscaled and clipped.
    """

    allow_update: Callable[["GuardedAdamW"], bool] | None = None

    def step(self, closure: Any = None) -> Any:
        if self.allow_update is not None and not self.allow_update(self):
            return None
        return super().step(closure)


def make_optimiser(module: nn.Module, config: OptimiserConfig) -> GuardedAdamW:
    """AdamW over what learns. Fused: seven times the plain one's speed on CPU, and no compiler as DeepSpeed's needs."""
    groups = parameter_groups(module, config.weight_decay)
    return GuardedAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
