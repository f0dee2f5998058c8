"""Exact state on disk: checkpoints/step_XXXXXXXX, whole or absent, the newest last.

    state-00001-of-000NN.safetensors ...   learned weights, moments and buffers, each whole (see `engine_state.py`)
    state.json       step counts, loss scaler, running averages
    manifest.json    {"step", "world", "files": {name: {sha256, size}}, "tensors": {name: sha256}, "frozen": the same}

A folder is built under a hidden name and renamed once all processes have written and all is flushed, so one that has
its name is complete. Nothing in it depends on the number of processes or the ZeRO stage. Frozen weights are not in
it: they come from where the run got them, and must be the same. Several machines need a run folder that they share.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogvideo.checkpoint.tensor_file import TensorInfo, write_tensor_file
from cogvideo.distributed import run_on_all_ranks
from cogvideo.files import atomic_write, read_json, sha256_file, write_json
from cogvideo.logs import get_logger
from cogvideo.training.engine_state import EngineState, tensor_hash

log = get_logger(__name__)

NAME = re.compile(r"step_(\d{8})")
MANIFEST, NUMBERS = "manifest.json", "state.json"
FORMAT = 2
"""1 was DeepSpeed's own files."""
MAX_FILE_BYTES = 1 << 30
"""A process holds one file's tensors in memory while it writes them; a tensor larger than this has its own file."""


def save_state(
    engine: EngineState,
    folder: Path,
    step: int,
    numbers: dict[str, Any],
    keep_last: int,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write a checkpoint after `step` steps, every process its share of the files; older ones beyond `keep_last` go.

    `numbers` is plain JSON, as the first process has it.
    Raises: OSError on every process if any could not write; what was there before stays.
    """
    place = folder / f"step_{step:08d}"
    building = folder / f".{place.name}.tmp"
    first = dist.get_rank() == 0

    def start() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        building.mkdir()

    def finish() -> None:
        write_json(building / NUMBERS, numbers | {"engine": engine.numbers()})
        files[NUMBERS] = {"sha256": sha256_file(building / NUMBERS), "size": (building / NUMBERS).stat().st_size}
        about = {"format": FORMAT, "step": step, "world": dist.get_world_size()}
        write_json(building / MANIFEST, about | {"files": files, "tensors": tensors, "frozen": frozen})
        _flush(building)
        if place.exists():
            _remove(place)
        os.rename(building, place)
        with atomic_write(folder / "latest") as temporary:
            temporary.write_text(place.name + "\n", encoding="utf-8")
        saved = _saved(folder)
        here = saved.index(place)
        # later ones were damaged, or this run would have gone on from them
        for other in [*saved[here + 1 :], *saved[: here + 1][:-keep_last]]:
            _remove(other)

    frozen = engine.frozen_hashes()
    try:
        run_on_all_ranks(start if first else None)
        files, tensors = _write_tensors(engine, building, max_file_bytes)
        run_on_all_ranks(finish if first else None)
    except OSError:
        if first:
            shutil.rmtree(building, ignore_errors=True)  # so that a full disk has room again
        raise
    return place


def _write_tensors(engine: EngineState, building: Path, max_file_bytes: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Every process gathers all tensors, one at a time, keeps those of its own files and writes them.

    Returns what the manifest says of files and of tensors, the same on all processes.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    infos = engine.infos()
    groups = _cut(infos, max_file_bytes)
    files: dict[str, Any] = {}
    tensors: dict[str, str] = {}
    for begin in range(0, len(groups), world):
        own: dict[str, Tensor] = {}
        for writer, group in enumerate(groups[begin : begin + world]):
            for name in group:
                value = engine.read(name)
                if writer == rank:
                    own[name] = value.detach().to("cpu", copy=True)

        def write(own: dict[str, Tensor] = own, number: int = begin + rank + 1) -> Any:
            path = building / f"state-{number:05d}-of-{len(groups):05d}.safetensors"
            sha256 = write_tensor_file(path, {name: infos[name] for name in own}, own.__getitem__)
            hashes = {name: tensor_hash(tensor) for name, tensor in own.items()}
            return path.name, {"sha256": sha256, "size": path.stat().st_size}, hashes

        for written in run_on_all_ranks(write if own else None):
            if written is not None:
                files[written[0]] = written[1]
                tensors |= written[2]
    return dict(sorted(files.items())), {name: tensors[name] for name in infos}


def newest_state(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are passed over with a warning.

    The first process looks, and tells the others.
    """

    def look() -> Path | None:
        for place in reversed(_saved(folder)):
            problem = _problem(place)
            if problem is None:
                return place
            log.warning("%s is damaged (%s); going back to the one before it", place, problem)
        return None

    return run_on_all_ranks(look if dist.get_rank() == 0 else None)[0]


def load_state(engine: EngineState, place: Path) -> dict[str, Any]:
    """Restore a checkpoint that `newest_state` found; returns the numbers that `save_state` was given.

    Raises: ValueError if it is of another model, or its run had other frozen weights.
    """
    manifest, numbers = read_json(place / MANIFEST), read_json(place / NUMBERS)
    expected = engine.infos()
    for name in sorted(expected.keys() ^ manifest["tensors"].keys()):
        has = "no such tensor" if name in expected else "more than this run learns:"
        raise ValueError(f"{place} does not fit this run: {has} {name}; use the settings that it was made with")
    _check_frozen(engine, manifest["frozen"], place)
    for name, value in _stored_tensors(place, manifest):
        if tuple(value.shape) != expected[name].shape:
            raise ValueError(
                f"{place} does not fit this run: {name} has shape {tuple(value.shape)}, "
                f"expected {expected[name].shape}; use the settings that it was made with"
            )
        engine.write(name, value)
    engine.set_numbers(numbers["engine"])
    return numbers


def _remove(place: Path) -> None:
    """Under a hidden name, so that what a kill leaves of it is known for what it is."""
    hidden = place.with_name(f".{place.name}.old")
    os.rename(place, hidden)
    shutil.rmtree(hidden)


def remove_unfinished(folder: Path) -> None:
    """What a run that was killed while saving left."""
    for left in folder.glob(".step_*"):
        shutil.rmtree(left)


def _check_frozen(engine: EngineState, stored: dict[str, str], place: Path) -> None:
    """The frozen weights, which the checkpoint lacks, must be exactly those that it was trained with."""
    here = engine.frozen_hashes()
    problem = None
    if dist.get_rank() == 0:
        problem = next((name for name in sorted(here.keys() | stored) if here.get(name) != stored.get(name)), None)
    problem = run_on_all_ranks((lambda: problem) if dist.get_rank() == 0 else None)[0]
    if problem is not None:
        raise ValueError(
            f"{place} was trained beside other frozen weights ({problem} differs); set init.checkpoint to what the run "
            "started from, of which export/trunk in its run folder is a copy, and init.trunk_weights as it was"
        )


def _stored_tensors(place: Path, manifest: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """All tensors of a checkpoint, mapped from the files, in the order of the files (the same on every process)."""
    for file in sorted(name for name in manifest["files"] if name.endswith(".safetensors")):
        try:
            with safe_open(place / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{place / file} is damaged: {error}") from None


def _cut(infos: dict[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if groups[-1] and filled + info.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.nbytes
    return groups


def _saved(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def _problem(place: Path) -> str | None:
    try:
        manifest = read_json(place / MANIFEST)
        if manifest.get("format") != FORMAT:
            return "it is of an earlier version"
        files = manifest["files"]
        if not (isinstance(manifest["tensors"], dict) and isinstance(manifest["frozen"], dict) and NUMBERS in files):
            return f"{MANIFEST} is not as it was written"
        for name, said in files.items():
            path = place / name
            if not path.is_file() or path.stat().st_size != said["size"] or sha256_file(path) != said["sha256"]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        return str(error)
    return None


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
