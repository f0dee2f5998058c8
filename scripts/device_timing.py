"""Time and memory of work on a device, for the benchmarks in this folder; on a GPU, time is from CUDA events."""

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from cogvideo.distributed import open_device

T = TypeVar("T")


def add_device_argument(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    parser.add_argument(
        "--device", default=default, metavar="NAME", help="cpu, cuda, cuda:0 or auto; default %(default)s"
    )


def device_argument(parser: argparse.ArgumentParser, args: argparse.Namespace) -> torch.device:
    """The device of `--device`, a GPU always with its index, which functions that set something for it ask for.

    A wrong one ends the program with one line and exit code 2.
    """
    try:
        device = open_device(args.device)
    except ValueError as error:
        parser.error(f"--{error}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that `work` takes on the device, and what it returns."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = work()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    result = work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result


def reset_peak(device: torch.device) -> None:
    """Let `peak_gb` count from now on: what is held on a GPU now, and what comes. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """Peak memory of tensors on a GPU since `reset_peak`, or ever if that was not called, in GB; None on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.type == "cuda" else None


def read_speed(device: torch.device) -> float:
    """Memory bandwidth in bytes per second: the best of several sums."""
    data = torch.ones(1 << (30 if device.type == "cuda" else 26), device=device)  # more than caches hold
    return data.nbytes / min(timed(device, data.sum)[0] for _ in range(8))
