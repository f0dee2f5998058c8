"""The interface between the trainer and its task, and code that tasks share. The training loop is the same for all."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cogvideo.dtypes import FLOAT_DTYPES
from cogvideo.model.compiled import check_compiler
from cogvideo.model.transformer import TrunkModel
from cogvideo.training.config import TrainConfig

B = TypeVar("B")

COMPONENTS = (
    ("embeddings", "embeddings"),
    ("layernorm", "layernorm"),
    ("mix_logit", "mix"),
    ("temporal_attention", "temporal"),
    ("high_res_attention", "high_res"),
    ("attention", "spatial"),
    ("mlp", "mlp"),
)
"""(word, component): a transformer's parameter belongs to the component of the first word that its name contains."""


Metrics = Mapping[str, tuple[float | Tensor, float]]
"""(sum, weight) by name. Tensors are scalars that stay on the device until the end of a step, see `read_metrics`."""


class LossAndMetrics(NamedTuple):
    """The result of an objective's forward; a tuple, since DeepSpeed looks for tensors in what a module returns."""

    loss: Tensor
    """A scalar to differentiate."""
    metrics: Metrics


class Task(Protocol[B]):
    """The trainer's interface to what it trains; B is the type of its batches."""

    @property
    def objective(self) -> nn.Module:
        """Its forward takes a micro-batch and returns LossAndMetrics."""

    @property
    def updated_without_gradient(self) -> tuple[str, ...]:
        """Names of parameters of `objective` that change without a gradient."""

    def batches(self, first_step: int) -> Iterator[B]:
        """This rank's share of every step's batch, from `first_step` on."""

    def validation_batches(self) -> list[B]:
        """Fixed batches that are never trained on; empty without validation data."""

    def micro_batch(self, batch: B, index: int, count: int) -> B:
        """Micro-batch `index` of `count` (every count-th row), on the device."""

    def tokens(self, batch: B) -> int:
        """The number of text and frame tokens in a batch."""

    def flops(self, batch: B) -> float:
        """FLOPs of the model's forward and backward pass over a batch, without recomputation; 0 if unknown."""

    def component_of(self, parameter: str) -> str:
        """The component that a parameter of `objective` counts towards in gradient norms."""

    def after_step(self, step: int, is_updated: bool) -> None:
        """Update what has no gradient after 0-based `step`, unless the step was skipped (`is_updated` is false)."""

    def weight_metrics(self) -> dict[str, float]:
        """Metrics of the weights themselves."""

    def inputs(self) -> dict[str, Any]:
        """What the weights depend on besides settings, as plain JSON; saved with each checkpoint, under `inputs`."""

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        """Compare with what a checkpoint's state.json holds. Raises: ValueError if this task cannot continue from it.

        Checkpoints of older versions have no `inputs`.
        """

    def report(self) -> None:
        """Log what the user should know about the trained model; at the end of a run, on rank 0."""

    def export(self, folder: Path, step: int) -> Path:
        """Write the model into `folder` in our checkpoint format; returns its path. Every rank must call this."""


def read_metrics(of_forwards: Sequence[Metrics]) -> list[dict[str, tuple[float, float]]]:
    """The metrics with numbers for tensors, all of which are read at once: the host waits for a GPU at most once."""
    tensors = [value for metrics in of_forwards for value, _ in metrics.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack([tensor.detach().double() for tensor in tensors]).tolist() if tensors else [])
    return [
        {name: (next(numbers) if isinstance(value, Tensor) else value, weight) for name, (value, weight) in m.items()}
        for m in of_forwards
    ]


def component_of(parameter: str) -> str:
    """The component of a transformer's parameter: embeddings, layernorm, mix, temporal, high_res, spatial or mlp."""
    return next(component for word, component in COMPONENTS if word in parameter)


def compile_layers(model: TrunkModel, config: TrainConfig, device: torch.device) -> None:
    """Compile the layers if train.compile says so. Raises: ValueError if there is no compiler for the device."""
    if config.train.compile:
        check_compiler(device)
        model.compile_layers()


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Matrix products in train.dtype with float32 weights; a no-op where the weights have that dtype themselves."""
    enabled = config.train.dtype != "fp32" and config.train.weights == "fp32"
    dtype = FLOAT_DTYPES[config.train.dtype] if enabled else torch.bfloat16  # torch warns about float32 here
    return torch.autocast(device.type, dtype, enabled=enabled)
