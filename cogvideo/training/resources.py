"""Memory and speed of a run: what it needs, estimated by `cogvideo.planning`, and what is measured while it runs."""

import math
import time
from dataclasses import dataclass

import torch

from cogvideo.dtypes import FLOAT_DTYPES
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
from cogvideo.training.config import LoopConfig, TrainConfig
from cogvideo.training.deepspeed_engine import zero_stage

log = get_logger(__name__)

LOG_ABOVE_BYTES = 1 << 30
"""Smaller runs log no memory estimate."""
MATMUL_SIZE = {"cuda": 8192, "cpu": 768}
"""Side of the square matrices that measure a device's peak FLOPS."""


@dataclass(frozen=True)
class RunMemory:
    """Bytes per process."""

    device: TrainingBudget
    """On the device; its optimiser is 0 if offloaded."""
    host: float
    """The optimiser's bytes in CPU memory, if offloaded."""

    def __str__(self) -> str:
        sizes = {name: getattr(self.device, name) for name in ("weights", "gradients", "activations")}
        parts = [f"{name} {format_bytes(size)}" for name, size in sizes.items()]
        optimiser = f"optimiser {format_bytes(self.host or self.device.optimiser)}"
        if self.host:
            optimiser += " of CPU memory"
        return ", ".join([*parts, optimiser])


def estimate_memory(config: TrainConfig, model: ModelConfig, world_size: int) -> RunMemory:
    """Memory of each of `world_size` processes with one device each.

    Raises: ValueError if the batch does not divide.
    """
    loop, init = config.train, config.init
    micro_batch = loop.batch_size // (world_size * loop.accumulation(world_size))
    stage = zero_stage(config)
    settings = TrainingSettings(world_size, micro_batch, stage, init.freeze_trunk, loop.recompute, init.trunk_weights)
    machine = MACHINES["a100-80"]  # irrelevant for memory
    bf16 = training_budget(model, machine, settings)
    scale = 2 if loop.weights == "fp32" else 1  # weights and gradients in float32
    int8_bytes = int8_trunk_size(model)[1] if init.trunk_weights == "int8" else 0
    # in float32 without ZeRO the optimiser holds no second copy of the weights: 8 of 12 bytes per parameter
    optimiser = bf16.optimiser * (8 / 12 if scale == 2 and stage == 0 else 1)
    offload = config.deepspeed.offload_optimizer
    device = TrainingBudget(
        weights=(bf16.weights - int8_bytes) * scale + int8_bytes,
        gradients=bf16.gradients * scale,
        optimiser=0.0 if offload else optimiser,
        activations=bf16.activations * (1 if loop.dtype != "fp32" else 2),
        seconds_per_step=math.nan,
    )
    return RunMemory(device, optimiser if offload else 0.0)


def log_memory(config: TrainConfig, model: ModelConfig, world_size: int, device: torch.device) -> None:
    """Log the estimate of a large run, and warn if it is unlikely to fit."""
    memory = estimate_memory(config, model, world_size)
    if memory.device.total < LOG_ABOVE_BYTES:
        return
    log.info("estimated memory of each of %d processes: %s", world_size, memory)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory * USABLE_MEMORY
        if memory.device.total > available:
            log.warning(
                "that exceeds the %s that are safe to use on the device; see configs/deepspeed for leaner settings",
                format_bytes(available),
            )


class Throughput:
    """Tokens and FLOPS per second between two log lines.

    MFU (model FLOPS utilisation) counts the model's own FLOPs, nothing recomputed, relative to the device's peak.
    """

    def __init__(self, device: torch.device, world_size: int, peak_flops: float | None) -> None:
        """`peak_flops`: FLOPS of one process's device; None leaves out MFU."""
        self._device, self._world_size, self._peak = device, world_size, peak_flops
        self._reset()

    def add(self, tokens: int, flops: float) -> None:
        """Count one step of this process."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops

    def take(self, steps_left: int) -> dict[str, float]:
        """The numbers since the last call."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        seconds_per_step = elapsed / max(self._steps, 1)
        metrics = {
            "tokens_per_second": self._tokens * self._world_size / elapsed,
            "seconds_per_step": seconds_per_step,
            "minutes_left": seconds_per_step * steps_left / 60,
            "memory_mib": peak_memory_mib(self._device),
        }
        if self._peak and self._flops:
            metrics["mfu"] = self._flops / elapsed / self._peak
        self._reset()
        return metrics

    def _reset(self) -> None:
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._start = time.monotonic()


def peak_memory_mib(device: torch.device) -> float:
    """The peak memory of this process so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPS of a large matrix product in `dtype`, the best of three: roughly the most that the device can reach.

    None where the device emulates `dtype`: measuring would be slow, and its peak is no useful reference.
    """
    if not has_native_matmul(device, dtype):
        return None
    side = MATMUL_SIZE[device.type]
    a = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):  # the first one starts threads and loads libraries
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def has_native_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has matrix instructions for this type; a CPU without them emulates it."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported() or "avx512_fp16" in _cpu_flags()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def warn_if_emulated(device: torch.device, loop: LoopConfig) -> None:
    """Warn if the CPU emulates train.dtype."""
    if not has_native_matmul(device, FLOAT_DTYPES[loop.dtype]):
        log.warning(
            "this CPU has no %s instructions and emulates them about a hundred times slower; set train.dtype=fp32",
            loop.dtype,
        )


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return {word for line in file if line.startswith("flags") for word in line.split()}
    except OSError:
        return set()
