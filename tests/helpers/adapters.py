"""Adapters of random numbers for small models."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from cogvideo.checkpoint.adapter import Base, save_adapter
from cogvideo.model.config import LoraConfig
from cogvideo.model.lora import adapter_parameters, add_adapters
from cogvideo.tensor_file import TensorInfo


def randomise(model: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Give the factors of a model's adapters random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in adapter_parameters(model):
            p.copy_(size * torch.randn(p.shape, generator=generator))


def write_adapter(
    folder: Path, model: nn.Module, base: Base, *, targets: Sequence[str] = (), rank: int = 2, seed: int = 0
) -> Path:
    """Write an adapter for a model, which is left with it beside its weights."""
    config = LoraConfig(rank=rank, alpha=4.0, targets=tuple(targets))
    add_adapters(model, config)
    randomise(model, seed)
    parameters = dict(adapter_parameters(model))
    infos = {name: TensorInfo.of(p) for name, p in parameters.items()}
    save_adapter(folder, config, infos, lambda name: parameters[name].detach(), base)
    return folder
