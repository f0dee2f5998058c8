"""Tensors of tiny models under published (SAT) names, and conversion without progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cogvideo.checkpoint.parameters import ModelKind, Sizes, model_parameters
from cogvideo.checkpoint.sat.config import SatSettings
from cogvideo.checkpoint.sat.convert import from_sat

WriteSat = Callable[..., Path]
"""The type of the fixture `write_sat`."""
NUM_EXTRA_POSITIONS = {"image": 0, "video": 20, "direct_superres": 36, "iterative_superres": 36}


def sat_tensors(kind: ModelKind, *, num_layers: int = 2, hidden_size: int = 8) -> dict[str, torch.Tensor]:
    sizes = Sizes(num_layers, hidden_size, 24, num_positions=64, num_extra_positions=NUM_EXTRA_POSITIONS[kind])
    generator = torch.Generator().manual_seed(3)
    parameters = model_parameters(kind, num_layers)
    return {p.sat_name: torch.randn(sizes.shape_of(p), generator=generator).half() for p in parameters}


def ignore_progress() -> None: ...


def convert(source: Path, out: Path, settings: SatSettings, **options: Any) -> None:
    from_sat(source, out, settings, **options).run(ignore_progress)
