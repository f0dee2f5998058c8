"""Numbers of a run: means over steps and processes, metrics.jsonl, and curves as a picture."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cogvideo.files import atomic_write


class Averages:
    """Weighted means, kept as float64 sums so that they can be saved and go on exactly."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, tuple[float, float]]) -> None:
        """Add (sum, weight) by name."""
        for name, (total, weight) in values.items():
            old_total, old_weight = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old_total + total, old_weight + weight)

    def means(self) -> dict[str, float]:
        """Over all processes (each must call this), by sorted name; names never seen with weight are left out."""
        sums = self.sums
        if dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self.sums)
            merged = Averages()
            for part in gathered:
                merged.add(part)
            sums = merged.sums
        return {name: total / weight for name, (total, weight) in sorted(sums.items()) if weight}

    def clear(self) -> None:
        self.sums = {}


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with its step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def rewind(self, step: int) -> None:
        """Drop lines after `step`, and a last line that was cut: a resumed run writes them again."""
        kept = [record for record in self.read() if record["step"] <= step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record. A folder that vanished is made anew.

        Raises: OSError if that fails; the line is kept, and goes before the next.
        """
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}
        self._waiting.append(json.dumps(clean) + "\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            text = "".join(self._waiting).encode()
            try:
                written = file.write(text)
                if written != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)  # no half line, to which the next would be appended
                raise
        self._waiting.clear()

    def read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the line that a crash cut short
                break
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                break
            records.append(record)
        return records


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Losses, and losses by part, over steps, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(11, 4), layout="constrained")
    whole, parts = figure.subplots(1, 2)
    names = sorted({name for record in records for name in record})
    for name in names:
        points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
        axes = whole if name in ("loss", "validation/loss") else parts if name.startswith("loss/") else None
        if axes is not None and points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    for axes, title in ((whole, "loss"), (parts, "loss by part")):
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this process has held so far: of the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
