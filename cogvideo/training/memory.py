"""What a run needs of each process's device and of its host, estimated by cogvideo.planning; allocator tuning."""

import ctypes
import math
import os
from dataclasses import dataclass

import torch

from cogvideo.logs import get_logger
from cogvideo.model.config import ModelConfig
from cogvideo.planning.budgets import (
    USABLE_MEMORY,
    TrainingBudget,
    TrainingSettings,
    int8_trunk_size,
    training_budget,
)
from cogvideo.planning.machines import MACHINES
from cogvideo.planning.report import format_bytes
from cogvideo.training.config import TrainConfig

log = get_logger(__name__)

WORTH_TELLING_BYTES = 1 << 30

_LARGE_BLOCK = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def return_freed_memory() -> None:
    """Let large blocks go back to the system when they are freed, where the allocator is glibc's; else do nothing.

    By itself glibc soon keeps blocks of up to 32 MB, and the holes between a step's activations add up. The price is a
    fresh mapping for each large tensor; huge pages, which torch takes if asked before its first tensor, halve it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, _LARGE_BLOCK)


@dataclass(frozen=True)
class RunMemory:
    """Bytes for one process."""

    device: TrainingBudget
    """Its optimiser is 0 where it is offloaded."""
    host: float
    """Of the optimiser, offloaded."""

    def __str__(self) -> str:
        parts = [
            f"{name} {format_bytes(getattr(self.device, name))}" for name in ("weights", "gradients", "activations")
        ]
        optimiser = (
            f"optimiser {format_bytes(self.host or self.device.optimiser)}{' of CPU memory' if self.host else ''}"
        )
        return ", ".join([*parts, optimiser])


def run_memory(config: TrainConfig, model: ModelConfig, world: int) -> RunMemory:
    """For `world` processes, a device each. Raises: ValueError if the batch cannot be cut so."""
    loop, spread = config.train, config.deepspeed
    micro = loop.batch_size // (world * loop.accumulation(world))
    stage = max(spread.stage, 1 if loop.weights == "dtype" else 0)
    init = config.init
    settings = TrainingSettings(world, micro, stage, init.freeze_trunk, loop.recompute, init.trunk_weights)
    machine = MACHINES["a100-80"]  # of its own figures memory needs none
    bf16 = training_budget(model, machine, settings)
    wide = 2 if loop.weights == "fp32" else 1  # weights and gradients in float32
    narrow = int8_trunk_size(model)[1] if init.trunk_weights == "int8" else 0
    copies = 8 / 12 if wide == 2 and stage == 0 else 1  # no second float32 copy of the weights then
    optimiser = bf16.optimiser * copies
    device = TrainingBudget(
        weights=(bf16.weights - narrow) * wide + narrow,
        gradients=bf16.gradients * wide,
        optimiser=0.0 if spread.offload_optimizer else optimiser,
        activations=bf16.activations * (1 if loop.dtype != "fp32" else 2),
        seconds_per_step=math.nan,
    )
    return RunMemory(device, optimiser if spread.offload_optimizer else 0.0)


def tell_memory(config: TrainConfig, model: ModelConfig, world: int, device: torch.device) -> None:
    """One line at the start of a large run, and a warning where it will hardly fit."""
    memory = run_memory(config, model, world)
    if memory.device.total < WORTH_TELLING_BYTES:
        return
    log.info("memory of each of %d processes, estimated: %s", world, memory)
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory * USABLE_MEMORY
        if memory.device.total > room:
            log.warning(
                "that is more than the device's %s; see configs/deepspeed for leaner settings", format_bytes(room)
            )
