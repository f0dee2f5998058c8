"""One step: forward and backward over its micro-batches, then one update, unless something is not finite."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cogvideo.distributed import any_rank
from cogvideo.rng import seed_dropout
from cogvideo.training.config import TrainConfig
from cogvideo.training.deepspeed_engine import clips_itself
from cogvideo.training.engine_state import inner_optimiser
from cogvideo.training.gradients import GradientNorms
from cogvideo.training.metrics import Averages
from cogvideo.training.optimiser import GuardedAdamW, learning_rate
from cogvideo.training.tasks.clips import Task


@dataclass(frozen=True)
class StepResult:
    grad_norm: float | None
    """Before clipping; None where DeepSpeed does not tell it."""
    good: bool
    """Whether all was finite on every process; if not, weights and moments are as before."""
    overflowed: bool = False
    """fp16's loss scaler skipped the update, as it does now and then, and lowers its scale."""


class Stepper:
    """Takes steps with an engine; adds what the objective tells to `averages`."""

    def __init__(self, engine: Any, task: Task, config: TrainConfig, device: torch.device, averages: Averages) -> None:
        self._engine, self._task, self._config, self._device, self._averages = engine, task, config, device, averages
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._accumulation = config.train.accumulation(self._world)
        self.gradient_norms = GradientNorms(engine, task.part_of)
        """By part, of the last step taken with `with_norms`."""
        inner_optimiser(engine).allow_update = self._allow_update
        self._norm: float | None = None
        self._good = self._with_norms = True

    def take(self, batch: Any, step: int, with_norms: bool) -> StepResult:
        """The 0-based `step`. Every process must take it with its own part of the batch."""
        loop, engine = self._config.train, self._engine
        engine.train()
        good = True
        for micro in range(self._accumulation):
            # over all processes, so that dropout is the same however the batch is shared out
            seed_dropout(loop.seed, step, self._rank + self._world * micro)
            outcome = engine(self._task.part(batch, micro, self._accumulation))
            loss = outcome.loss
            if torch.isfinite(loss):
                self._averages.add(outcome.metrics)
            else:
                good = False
                loss = _no_gradient(engine.module)
            engine.backward(loss)
            if micro < self._accumulation - 1:
                engine.step()
        self._good, self._with_norms = not any_rank(not good, self._device), with_norms
        rate = learning_rate(step, loop.steps, self._config.optimiser)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        self._norm = self._clip()
        engine.step()
        norm = engine.get_global_grad_norm() if self._norm is None else self._norm
        if loop.dtype == "fp16" and self._good and not _is_norm(norm):
            return StepResult(None, good=True, overflowed=True)
        return StepResult(None if norm is None else float(norm), self._good and _is_norm(norm))

    def _allow_update(self, optimiser: GuardedAdamW) -> bool:
        """Asked by AdamW when gradients are final, in every process alike."""
        norm = self._norm if clips_itself(self._config) else getattr(self._engine.optimizer, "_global_grad_norm", None)
        if not (self._good and _is_norm(norm)):
            return False
        if self._with_norms:
            self.gradient_norms.add(p for group in optimiser.param_groups for p in group["params"])
        return True

    def _clip(self) -> float | None:
        if not clips_itself(self._config):
            return None
        limit = self._config.optimiser.grad_clip or math.inf
        learned = [p for p in self._engine.module.parameters() if p.requires_grad]
        return float(torch.nn.utils.clip_grad_norm_(learned, limit))


def _is_norm(norm: Any) -> bool:
    """Whether a gradient norm is one: DeepSpeed tells NaN and infinity as -1 in places; None: not told."""
    return norm is None or (math.isfinite(norm) and norm >= 0)


def _no_gradient(module: torch.nn.Module) -> torch.Tensor:
    """A loss of zero with a zero gradient for every parameter: keeps all processes in step."""
    return sum((p.sum() * 0.0 for p in module.parameters() if p.requires_grad), start=torch.zeros(()))
