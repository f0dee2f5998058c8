"""The machines that a model may run on: vendors' figures by name, and a measurement of this machine."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Machine:
    """A single device, however many of them are used."""

    name: str
    memory_bytes: float
    flops: float
    """Floating-point operations per second in dense bf16; a multiply-add counts as two."""
    bandwidth: float
    """Bytes of memory read per second."""
    link: float = 12e9
    """Bytes per second that one device sends to others in the same computer in reductions: an estimate."""
    is_gpu: bool = True
    has_float8: bool = False
    """Whether it multiplies float8, at twice the rate of bf16, as GPUs do since Ada and Hopper."""


MACHINES = {
    name: Machine(
        name,
        gigabytes * 1e9,
        teraflops * 1e12,
        terabytes_per_second * 1e12,
        gigabytes_per_second * 1e9,
        has_float8=name in ("rtx4090-24", "l40s-48", "h100-80", "h200-141"),
    )
    for name, gigabytes, teraflops, terabytes_per_second, gigabytes_per_second in (
        ("t4-16", 16, 65, 0.32, 6),
        ("v100-32", 32, 125, 0.90, 120),
        ("a10-24", 24, 125, 0.60, 12),
        ("rtx3090-24", 24, 71, 0.94, 12),
        ("rtx4090-24", 24, 165, 1.01, 12),
        ("l40s-48", 48, 362, 0.86, 12),
        ("a100-40", 40, 312, 1.56, 230),
        ("a100-80", 80, 312, 2.04, 230),
        ("h100-80", 80, 989, 3.35, 350),
        ("h200-141", 141, 989, 4.80, 350),
    )
}
"""The vendors' figures for dense bf16, or fp16 where the device has no bf16; links are three quarters of the vendor's
NVLink figure, or what PCIe reaches."""


def machine_like(name: str, memory_bytes: float) -> Machine:
    """The entry of MACHINES that a GPU's own name resembles, with its memory; the A100's figures for unknown GPUs."""
    word = name.lower().replace("geforce ", "").replace("rtx ", "rtx")
    alike = [machine for key, machine in MACHINES.items() if key.partition("-")[0] in word]
    nearest = min(alike or [MACHINES["a100-80"]], key=lambda machine: abs(machine.memory_bytes - memory_bytes))
    return replace(nearest, name=name, memory_bytes=memory_bytes)


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that processes here may use: the machine's, or less where a container (cgroup) has a limit.

    `root`: the folder that holds `proc` and `sys`.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        lines = []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:  # version 2
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):  # the limits of all of them apply
            with contextlib.suppress(OSError, ValueError):  # ValueError: `max`, which means no limit
                limits.append(int((base / folder / name).read_text()))
    return min(limits)


def measure_machine() -> Machine:
    """Measure this machine: its GPU if it has one, else its CPU. Takes a second or two and about 0.5 GB."""
    import torch

    from cogvideo.model.quantize import has_float8_products

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")

    def best_seconds(work: Callable[[], object], repeats: int) -> float:
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    rows, inner, columns = 512 if cuda else 64, 3072, 12288  # few rows on a CPU, which may emulate bf16 slowly
    weights = [torch.zeros(columns, inner, dtype=torch.bfloat16, device=device) for _ in range(4)]
    many = torch.zeros(rows, inner, dtype=torch.bfloat16, device=device)
    one = many[:1]
    flops = 2 * rows * inner * columns / best_seconds(lambda: many @ weights[0].T, 4)
    # Four matrices in turn, 300 MB together, do not fit into any cache.
    bandwidth = sum(w.nbytes for w in weights) / best_seconds(lambda: [one @ w.T for w in weights], 4)
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        return Machine(
            properties.name, properties.total_memory, flops, bandwidth, has_float8=has_float8_products(many.device)
        )
    return Machine(f"this machine's {os.cpu_count()} CPU cores", usable_memory(), flops, bandwidth, is_gpu=False)
