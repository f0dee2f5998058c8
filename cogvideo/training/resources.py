"""Memory and speed of a run: what it needs, estimated by `cogvideo.planning`, and what is measured while it runs."""

import contextlib
import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cogvideo.checkpoint.parameters import TransformerConfig
from cogvideo.dtypes import FLOAT_DTYPES
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.hub import resolve
from cogvideo.logs import get_logger
from cogvideo.model.config import TrunkWeights
from cogvideo.model.quantize import has_float8_products
from cogvideo.planning.budgets import (
    RECOMPUTE,
    USABLE_MEMORY,
    TrainingSettings,
    micro_batches,
    settings_that_fit,
    trained_and_all_parameters,
    training_budget,
)
from cogvideo.planning.machines import Machine, machine_like, usable_memory
from cogvideo.planning.report import describe_training, format_bytes
from cogvideo.tokenizers.text import open_text_tokenizer
from cogvideo.training.config import LoopConfig, TrainConfig
from cogvideo.training.deepspeed_engine import zero_stage

log = get_logger(__name__)

LOG_ABOVE_BYTES = 1 << 30
"""Runs whose weights take less than this in bfloat16 log no plan."""
PROCESS_STATUS = Path("/proc/self/status")
MATMUL_SIZE = {"cuda": 8192, "cpu": 768}
"""Side of the square matrices that measure a device's peak FLOPS."""


class NothingFits(ValueError):
    """No setting that was tried fits the machine's memory."""


def planned_model(config: TrainConfig) -> TransformerConfig | None:
    """The transformer that a run trains, if any; with the vocabulary of its text tokenizer if that file exists."""
    if config.task == "tokenizer":
        return None
    model: TransformerConfig = config.superres
    if config.task != "superres":
        model = dataclasses.replace(config.model, task=config.task)
    try:
        tokenizer = open_text_tokenizer(resolve(config.data.text_tokenizer or BUNDLED_WEIGHTS / "text.model"))
    except OSError:
        return model
    return dataclasses.replace(model, vocabulary=tokenizer.vocabulary)


def planned_settings(config: TrainConfig, count: int) -> TrainingSettings:
    """The planner's settings for a run in `count` processes with one device each.

    Raises: ValueError if the batch cannot be divided evenly, or `auto` is not resolved.
    """
    loop, init = config.train, config.init
    return TrainingSettings(
        count=count,
        micro_batch=loop.batch_size // (count * loop.accumulation(count)),
        zero_stage=zero_stage(config),
        frozen_trunk=init.freeze_trunk,
        recompute=loop.resolved_recompute,
        trunk_weights=init.trunk_weights,
        batch_size=loop.batch_size,
        offload_optimizer=config.deepspeed.offload_optimizer,
        weights=loop.weights,
        gradients=loop.gradients,
        products="fp32" if loop.dtype == "fp32" else "bf16",
        attention=loop.attention,
        lora=config.lora,
        ema=loop.ema_decay is not None,
    )


def resolve_auto(config: TrainConfig, machine: Machine, count: int) -> TrainConfig:
    """Replace `auto` by the fastest setting that fits the machine.

    Raises: NothingFits; ValueError if the batch cannot be divided evenly.
    """
    loop = config.train
    if "auto" not in (loop.micro_batch_size, loop.recompute):
        return config
    model = planned_model(config)
    if loop.batch_size % count:
        raise ValueError(f"train.batch_size={loop.batch_size} cannot be divided among {count} processes")
    sizes = micro_batches(loop.batch_size, count) if loop.micro_batch_size == "auto" else [loop.micro_batch_size]
    choices = [
        dataclasses.replace(loop, micro_batch_size=size, recompute=what)
        for size in sizes
        for what in (RECOMPUTE if loop.recompute == "auto" else [loop.recompute])
    ]
    if model is None:  # the image tokenizer is small, and nothing of it is recomputed
        return dataclasses.replace(config, train=dataclasses.replace(choices[0], micro_batch_size=sizes[-1]))
    tried = {planned_settings(dataclasses.replace(config, train=choice), count): choice for choice in choices}
    found = settings_that_fit(model, machine, tried)
    if not found:
        needed = {settings: training_budget(model, machine, settings).total for settings in tried}
        least = min(needed, key=lambda settings: needed[settings])
        raise NothingFits(
            f"nothing fits {machine.name} with {format_bytes(machine.memory_bytes)}: at least "
            f"{format_bytes(needed[least])} are needed, with train.micro_batch_size={least.micro_batch} and "
            f"train.recompute={least.recompute}; see `cogvideo inspect --suggest`"
        )
    return dataclasses.replace(config, train=tried[found[0][0]])


def machine_of(device: torch.device) -> Machine:
    """The planner's entry for a device of this computer; for a CPU, with one process's share of the memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return machine_like(properties.name, properties.total_memory)
    share = usable_memory() / int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return Machine("this machine's CPU", share, flops=1e11, bandwidth=1e10, is_gpu=False)


def smallest_machine(device: torch.device) -> Machine:
    """This rank's machine, with the least memory of any rank's, since all ranks must choose the same settings."""
    machine = machine_of(device)
    sizes: list[Any] = [machine.memory_bytes]
    if dist.get_world_size() > 1:
        sizes = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, machine.memory_bytes)
    return dataclasses.replace(machine, memory_bytes=min(sizes))


def log_plan(config: TrainConfig, model: TransformerConfig, world_size: int, device: torch.device) -> None:
    """Log the plan of a large run, and warn if it is unlikely to fit."""
    machine, settings = machine_of(device), planned_settings(config, world_size)
    if 2 * trained_and_all_parameters(model, settings)[1] < LOG_ABOVE_BYTES:
        return
    budget = training_budget(model, machine, settings)
    for line in describe_training(model, machine, settings, "figures for such a device").splitlines():
        log.info("%s", line)
    if device.type == "cuda" and not budget.fits(machine):
        log.warning(
            "that exceeds the %s that are safe to use on the device; see `cogvideo inspect --suggest`",
            format_bytes(machine.memory_bytes * USABLE_MEMORY),
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
    with contextlib.suppress(OSError):  # not on Linux
        if peak := re.search(r"VmHWM:\s*(\d+)", PROCESS_STATUS.read_text()):  # which some sandboxes leave out
            return int(peak[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # includes the parent's peak before the start


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPS of a large matrix product in `dtype`, the best of four: roughly the most that the device can reach.

    None where the device emulates `dtype`: measuring would be slow, and the result not a useful reference.
    """
    if not has_native_matmul(device, dtype):
        return None
    side = MATMUL_SIZE[device.type]
    # random, since products of ones need less power, which lets a GPU clock higher than in training
    a = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first one starts threads and loads libraries
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def has_native_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has matrix instructions for this type; a CPU or GPU without them emulates it."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or dtype == torch.float32:
        return True
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported() or "avx512_fp16" in _cpu_flags()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_fp16(loop: LoopConfig) -> None:
    """Raises: ValueError if training is to be in fp16, and DeepSpeed does not support that on this machine."""
    if loop.dtype != "fp16":
        return
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise ValueError("train.dtype=fp16 needs a GPU, or a CPU that multiplies fp16; set train.dtype=bf16 or fp32")


def warn_if_emulated(device: torch.device, loop: LoopConfig, trunk_weights: TrunkWeights = "full") -> None:
    """Warn if the device emulates train.dtype, or if float8 weights are dequantized instead of multiplied directly."""
    if trunk_weights == "float8" and (loop.dtype != "bf16" or not has_float8_products(device)):
        log.warning(
            "float8 products need train.dtype=bf16 and an Ada, Hopper or later GPU; here, init.trunk_weights=float8 is "
            "dequantized at each use like int8, which is more accurate: set init.trunk_weights=int8"
        )
    if not has_native_matmul(device, FLOAT_DTYPES[loop.dtype]):
        kind, what, remedy = "CPU", "emulates them about a hundred times slower", "train.dtype=fp32"
        if device.type != "cpu":
            kind, what = "GPU", "emulates them slowly"
            remedy = "train.dtype=fp16 train.weights=dtype, or train.dtype=fp32"
        log.warning("this %s has no %s instructions and %s; set %s", kind, loop.dtype, what, remedy)


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return {word for line in file if line.startswith("flags") for word in line.split()}
    except OSError:
        return set()
