"""Exact state on disk: DeepSpeed's own files in checkpoints/step_XXXXXXXX, whole or absent, the newest last.

A folder is built under a hidden name and renamed once all processes have written and all is flushed, so one that has
its name is complete. Frozen weights are not in it: they come from where the run got them. The files are pickles, as
DeepSpeed makes them: resume only from your own run folders; weights to share are in export/, as safetensors.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cogvideo.files import atomic_write, read_json, sha256_file, write_json
from cogvideo.logs import get_logger
from cogvideo.training.engine import parameter_hashes

log = get_logger(__name__)

NAME = re.compile(r"step_(\d{8})")
MANIFEST = "manifest.json"


def save_state(engine: Any, folder: Path, step: int, state: dict[str, Any], keep_last: int) -> Path:
    """Write a checkpoint of all processes after `step` steps; older ones beyond `keep_last` go."""
    place = folder / f"step_{step:08d}"
    building = folder / f".{place.name}.tmp"
    first = dist.get_rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step_*"):  # of a run that was killed while saving
            shutil.rmtree(left)
    dist.barrier()
    engine.save_checkpoint(
        str(folder),
        tag=building.name,
        client_state={"cogvideo": state},
        save_latest=False,
        exclude_frozen_parameters=True,
    )
    tensors = parameter_hashes(engine.module)
    dist.barrier()
    if first:
        files = {p.name: {"sha256": sha256_file(p), "size": p.stat().st_size} for p in sorted(building.iterdir())}
        about = {"step": step, "world": dist.get_world_size(), "files": files, "tensors": tensors}
        write_json(building / MANIFEST, about)
        _flush(building)
        if place.exists():
            shutil.rmtree(place)
        os.rename(building, place)
        with atomic_write(folder / "latest") as temporary:
            temporary.write_text(place.name + "\n", encoding="utf-8")
        for old in _saved(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return place


def newest_state(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are passed over with a warning."""
    for place in reversed(_saved(folder)):
        problem = _problem(place)
        if problem is None:
            return place
        log.warning("%s is damaged (%s); going back to the one before it", place, problem)
    return None


def load_state(engine: Any, place: Path) -> dict[str, Any]:
    """Restore a checkpoint into an engine built alike; returns what `save_state` was given.

    Raises: ValueError if it is of another number of processes or another model.
    """
    made_by = read_json(place / MANIFEST)["world"]
    if made_by != dist.get_world_size():
        raise ValueError(
            f"{place} was saved by {made_by} processes, this run has {dist.get_world_size()}; start as many"
        )
    try:
        loaded, client = engine.load_checkpoint(str(place.parent), tag=place.name, load_module_strict=False)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{place} does not fit this run's model or settings: {reason}") from None
    if loaded is None:
        raise ValueError(f"{place} could not be read; remove it to go back to the one before it")
    return client["cogvideo"]


def _saved(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def _problem(place: Path) -> str | None:
    try:
        files = read_json(place / MANIFEST)["files"]
        for name, said in files.items():
            path = place / name
            if not path.is_file() or path.stat().st_size != said["size"] or sha256_file(path) != said["sha256"]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        return str(error)
    return None


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
