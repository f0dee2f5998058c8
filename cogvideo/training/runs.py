"""Comparison of run folders: settings that differ, the progress of each run, and all curves in one picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideo.config import leaves, read_yaml
from cogvideo.files import atomic_write
from cogvideo.training.metrics import MetricsFile

PANELS = ("loss", "validation/loss", "grad_norm", "lr")
"""Metrics that are drawn, each in a panel of its own."""
MAX_LETTERS = 48
"""Longest value in a table, in characters."""


@dataclass(frozen=True)
class Run:
    """The contents of a run folder."""

    folder: Path
    settings: Mapping[str, Any]
    """By key, such as train.steps."""
    records: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run folder. Raises: ValueError, OSError if `folder` is not one, or is damaged."""
        config = folder / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(
                f"{folder} is not a run folder: it has no config.yaml; give the run_dir of a training run"
            )
        return cls(folder, dict(leaves(read_yaml(config))), MetricsFile(folder / "metrics.jsonl").read())

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric."""
        return [(r["step"], r[name]) for r in self.records if isinstance(r.get(name), int | float)]


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """A row (key, value in each run) for every setting except run_dir that differs between runs; "-": not recorded."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "run_dir")
    rows = [[key, *(_text(run.settings[key]) if key in run.settings else "-" for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def results(runs: Sequence[Run]) -> list[list[str]]:
    """Rows (name, value in each run): the last step, the last loss, the last and the best validation loss."""
    rows = [["step", *(f"{max((r['step'] for r in run.records), default=0):,}" for run in runs)]]
    for name in ("loss", "validation/loss"):
        series = [run.series(name) for run in runs]
        if any(series):
            rows.append([name, *(f"{points[-1][1]:.4f}" if points else "-" for points in series)])
            if name == "validation/loss":
                best = [min(((value, step) for step, value in points), default=None) for points in series]
                rows.append(["  best, at step", *(f"{b[0]:.4f}, {b[1]:,}" if b else "-" for b in best)])
    return rows


def _text(value: Any) -> str:
    text = " ".join((json.dumps(value) if value is None or isinstance(value, bool) else str(value)).split())
    return text if len(text) <= MAX_LETTERS else f"{text[: MAX_LETTERS // 2 - 1]}…{text[-MAX_LETTERS // 2 :]}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def draw_runs(runs: Sequence[Run], path: Path) -> None:
    """Plot each of PANELS that any run has, one line per run, as a PNG.

    Raises: ValueError if no run has logged anything.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    panels = {name: [run.series(name) for run in runs] for name in PANELS}
    drawn = {name: lines for name, lines in panels.items() if any(lines)}
    if not drawn:
        raise ValueError("none of these runs has logged anything yet; there are no curves to draw")
    figure = Figure(figsize=(5.5 * len(drawn), 4), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        for run, points in zip(runs, lines, strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), label=str(run.folder), linewidth=1)
        axes.set_xlabel("step")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
