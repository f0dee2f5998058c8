"""What a run records about itself: running means, metrics.jsonl, wandb and TensorBoard, curves, and its origin.

Not here: measuring speed and memory (`resources.py`), sample sheets (`previews.py`).
"""

import contextlib
import errno
import itertools
import json
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from typing_extensions import TypedDict

from cogvideo import __version__
from cogvideo.config import dump_yaml, to_dict
from cogvideo.files import Count, atomic_write, checked, parse_json, read_json, write_json
from cogvideo.logs import get_logger, one_line, rank
from cogvideo.training.config import WEIGHTS, TrainConfig, with_weights_named

log = get_logger(__name__)

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece", "omegaconf")
"""Packages whose versions go into origin.json."""
WANDB_FILE = "wandb.json"
"""Holds the id of the run folder's wandb run, which a resumed run continues."""
MAX_LINE_BYTES = 1 << 20
"""Limit on a line of metrics.jsonl; lines written here have a few thousand bytes."""


class Averages:
    """Weighted means, stored as float64 sums so that a resumed run continues them exactly."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, tuple[float, float]]) -> None:
        """Add (sum, weight) per name."""
        for name, (total, weight) in values.items():
            old_total, old_weight = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old_total + total, old_weight + weight)

    def means(self) -> dict[str, float]:
        """Means over all ranks, sorted by name; every rank must call this. Names without weight are left out."""
        sums = self.sums
        if dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self.sums)
            merged = Averages()
            for rank_sums in gathered:
                merged.add(rank_sums)
            sums = merged.sums
        return {name: total / weight for name, (total, weight) in sorted(sums.items()) if weight}

    def clear(self) -> None:
        self.sums = {}


class Record(TypedDict):
    """A line of metrics.jsonl; all other keys are names of metrics."""

    step: Count


class MetricsFile:
    """metrics.jsonl: one JSON object per line, each with its step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[str] = []

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again, and damaged ones."""
        kept = [record for record in self.read() if record["step"] <= step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; recreates the folder if it is gone.

        Raises: OSError if that fails; the line is kept in memory and written before the next one.
        """
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}
        self._pending.append(json.dumps(clean) + "\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            text = "".join(self._pending).encode()
            try:
                written = file.write(text)
                if written != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)  # or the next line would be appended to half a line
                raise
        self._pending.clear()

    def read(self) -> list[dict[str, Any]]:
        """All records; damaged lines (a crash can truncate the last one) are left out with a warning."""
        if not self.path.is_file():
            return []
        records, damaged = [], []
        with open(self.path, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE_BYTES)
                if not line:
                    break
                try:
                    records.append(checked(parse_json(line, self.path), Record, self.path))
                except ValueError:
                    damaged.append(number)
        if damaged:
            more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            lines = ", ".join(map(str, damaged[:5]))
            log.warning("%s: skipping damaged line(s) %s%s", self.path, lines, more)
        return records


class MetricsWriter:
    """Sends each record to metrics.jsonl, and to wandb and TensorBoard if configured. Only rank 0 uses one."""

    def __init__(self, config: TrainConfig) -> None:
        """Check that the services can be used; rank 0 logs in to wandb. Writes nothing in the run folder.

        Raises: ValueError if log.tensorboard is set but tensorboard is not installed, or if wandb's login fails.
        """
        self._config = config
        self.file = MetricsFile(config.run_dir / "metrics.jsonl")
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._reported_failure = False
        if config.log.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("log.tensorboard=true needs tensorboard; pip install -e '.[tensorboard]'")
        if config.log.wandb == "online" and rank() == 0:
            _log_in_to_wandb()

    def open(self, first_step: int) -> None:
        """Start writing after `first_step` steps; records of later steps, which were lost, are dropped.

        Raises: ValueError or OSError if a service does not start; the run's own files are then unchanged.
        """
        if self._config.log.wandb != "off":
            self._wandb = self._open_wandb()
        if self._config.log.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(f"log.tensorboard=true: {error}; pip install -U -e '.[tensorboard]'") from None
            self._tensorboard = SummaryWriter(str(self._config.run_dir / "tensorboard"), purge_step=first_step + 1)
        self.file.rewind(first_step)

    def _open_wandb(self) -> Any:
        """Start a wandb run, or continue the one whose id is in the run folder."""
        import wandb

        folder, mode = self._config.run_dir, self._config.log.wandb
        file, is_new = folder / WANDB_FILE, not folder.exists()
        run_id = _stored_wandb_id(file)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "cogvideo",
                id=run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
                resume="allow" if mode == "online" else None,
                mode="online" if mode == "online" else "offline",
                dir=folder,
                config=json.loads(json.dumps(to_dict(self._config))),
                allow_val_change=True,  # train.steps of a resumed run, for example
            )
        except Exception as error:  # wandb's own errors, and those about its settings
            if is_new:
                shutil.rmtree(folder)
            advice = f"; remove {file} to start a new wandb run" if run_id else ""
            raise ValueError(f"log.wandb={mode}: wandb does not start ({one_line(error)}){advice}") from None
        write_json(file, {"id": run.id})
        return run

    def write(self, record: dict[str, Any]) -> None:
        """Write a record with its `step`. A full disk is reported once; lines stay in memory until there is space."""
        try:
            self.file.write(record)
            self._reported_failure = False
        except OSError as error:
            if not self._reported_failure:
                reason = error.strerror or error
                log.error("cannot write %s (%s); its lines stay in memory until there is space", self.file.path, reason)
            self._reported_failure = True
        numbers = {name: value for name, value in record.items() if name != "step"}
        self._send_to_wandb(numbers, record["step"])
        if self._tensorboard is not None:
            with self._tensorboard_may_fail(f"at step {record['step']}"):
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, record["step"])

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Send an image file to wandb and TensorBoard."""
        if self._wandb is not None:
            import wandb

            self._send_to_wandb({name: wandb.Image(str(path))}, step)
        if self._tensorboard is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            with self._tensorboard_may_fail(f"at step {step}"):
                self._tensorboard.add_image(name, pixels, step, dataformats="HWC")

    def _send_to_wandb(self, values: dict[str, Any], step: int) -> None:
        """Log to wandb; a failure is reported once, and ends the logging to wandb but not the run."""
        if self._wandb is None:
            return
        try:
            self._wandb.log(values, step=step)
        except Exception as error:
            log.error("wandb failed at step %d (%s); the run goes on without it", step, one_line(error))
            self._wandb = None

    @contextlib.contextmanager
    def _tensorboard_may_fail(self, when: str) -> Iterator[None]:
        """Report a failure inside the block, on a full disk say; it ends the logging to TensorBoard but not the run."""
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            log.error("TensorBoard failed %s (%s); the run goes on without it", when, reason)
            self._tensorboard = None

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            with self._tensorboard_may_fail("at the end"):
                self._tensorboard.close()


def _log_in_to_wandb() -> None:
    """Log in before a run is started. Raises: ValueError in one line."""
    import wandb

    try:
        if wandb.login(force=True) or os.environ.get("WANDB_MODE"):  # WANDB_MODE=offline needs no login
            return
        reason = "not logged in"
    except Exception as error:  # wandb's own errors, and those about its settings
        reason = one_line(error)
    raise ValueError(
        f"log.wandb=online: {reason.rstrip('.')}; run `wandb login`, set WANDB_API_KEY, or give log.wandb=offline"
    )


def _stored_wandb_id(file: Path) -> str | None:
    if not file.is_file():
        return None
    stored = read_json(file)
    run_id = stored.get("id") if isinstance(stored, dict) else None
    if not (isinstance(run_id, str) and re.fullmatch(r"[\w-]{1,128}", run_id)):
        raise ValueError(f"{file} does not contain a wandb run id; remove it to start a new wandb run")
    return run_id


def progress_text(metrics: Mapping[str, float]) -> str:
    """Loss, speed and memory for the progress bar."""
    shown = [f"loss {metrics.get('loss', math.nan):.4f}", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in metrics:
        shown.append(f"MFU {metrics['mfu']:.1%}")
    shown.append(f"{metrics['memory_mib'] / 1024:.1f} GiB")
    return ", ".join(shown)


CODEBOOK_PANELS = {"loss/perplexity": "codebook perplexity", "loss/codebook_used": "share of codes used"}
"""Panel titles of the image tokenizer's metrics that are not losses, by their names in metrics.jsonl."""


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Plot losses, losses by part (frame, clip length, round) and use of the codebook over steps, as a PNG.

    Perplexity and the share of codes used have panels, and so scales, of their own. Panels without data are left out.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}}
    for name in sorted({name for record in records for name in record}):
        points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
        if name in ("loss", "validation/loss"):
            title = "loss"
        elif name in CODEBOOK_PANELS:
            title = CODEBOOK_PANELS[name]
        elif name.startswith("loss/"):
            title = "loss by part"
        else:
            continue
        if points:
            panels.setdefault(title, {})[name] = points
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def write_origin(run_dir: Path, config: TrainConfig) -> None:
    """Write what the run was started from: config.yaml (resolved), origin.json (command, commit, versions, weights).

    Both record weights from the hub by name, with the commit that was fetched.
    """
    config = with_weights_named(config)
    weights = {f"{group}.{name}": getattr(getattr(config, group), name) for group, name in WEIGHTS}
    with atomic_write(run_dir / "config.yaml") as temporary:
        temporary.write_text(dump_yaml(config), encoding="utf-8")
    write_json(
        run_dir / "origin.json",
        {
            "command": sys.argv,
            "commit": _commit(),
            "python": platform.python_version(),
            "machine": platform.platform(),
            "weights": {key: str(path) for key, path in weights.items() if path is not None},
            "packages": {"cogvideo": __version__} | {name: _version(name) for name in PACKAGES},
        },
    )


def _commit() -> str | None:
    """The commit of the running source tree, marked if it has changes; None for an installed package."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "-uno") else commit


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
