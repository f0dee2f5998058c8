"""How fast a run is, against what the machine could do: tokens a second, MFU, time left, memory."""

import time

import torch

from cogvideo.logs import get_logger
from cogvideo.training.config import LoopConfig
from cogvideo.training.metrics import peak_memory_mib

log = get_logger(__name__)

_SIDE = {"cuda": 8192, "cpu": 768}
"""Of the square matrices whose product measures a machine's peak."""


class Throughput:
    """Counts between two lines of the log. MFU: the model's own flops (nothing recomputed) a second, over the peak."""

    def __init__(self, device: torch.device, world: int, peak_flops: float | None) -> None:
        """`peak_flops`: of one process's device, a second; None: MFU is left out."""
        self._device, self._world, self._peak = device, world, peak_flops
        self._start()

    def add(self, tokens: int, flops: float) -> None:
        """One step of this process."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops

    def take(self, steps_left: int) -> dict[str, float]:
        """The numbers since the last call."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        per_step = elapsed / max(self._steps, 1)
        found = {
            "tokens_per_second": self._tokens * self._world / elapsed,
            "seconds_per_step": per_step,
            "minutes_left": per_step * steps_left / 60,
            "memory_mib": peak_memory_mib(self._device),
        }
        if self._peak and self._flops:
            found["mfu"] = self._flops / elapsed / self._peak
        self._start()
        return found

    def _start(self) -> None:
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._since = time.monotonic()


def compute_dtype(loop: LoopConfig) -> torch.dtype:
    """Of matrix products."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[loop.dtype]


def measured_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Flops a second of a large matrix product in `dtype`, the best of three: about what the machine can reach.

    None where products are emulated: that would take long, and no number is worth reaching there.
    """
    if not has_fast_products(device, dtype):
        return None
    side = _SIDE[device.type]
    a = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):  # the first one starts threads and libraries
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def has_fast_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of this type itself, and does not emulate it."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported() or "avx512_fp16" in _cpu_flags()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def warn_of_slow_products(device: torch.device, loop: LoopConfig) -> None:
    dtype = compute_dtype(loop)
    if not has_fast_products(device, dtype):
        log.warning(
            "this processor has no %s instructions, and emulates them a hundred times slower; set train.dtype=fp32",
            loop.dtype,
        )


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return {word for line in file if line.startswith("flags") for word in line.split()}
    except OSError:
        return set()
