"""Training state on disk: checkpoints/step_XXXXXXXX, each complete or absent.

    state-00001-of-000NN.safetensors ...   weights, moments, averages and buffers by name, each a whole tensor
    state.json       step counts, loss scaler, running averages
    manifest.json    {"step", "world", "files": {name: {sha256, size}}, "tensors": {name: sha256}, "frozen": the same}

A checkpoint is built in a hidden folder and renamed once every rank has written its files and all are flushed to disk.
Nothing in it depends on the number of processes or the ZeRO stage, so a run can resume with different ones. Frozen
weights are not saved: they must be loaded from the same source again, and their hashes are checked. Runs on several
machines need a shared run folder. Not here: exports (`export.py`), which other commands read.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch.distributed as dist
from annotated_types import Len
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from cogvideo.checkpoint.format import FileEntry
from cogvideo.distributed import run_on_all_ranks
from cogvideo.files import (
    Count,
    atomic_write,
    checked,
    read_json,
    sha256_file,
    swap_in,
    torch_errors_as_os_errors,
    write_json,
)
from cogvideo.logs import get_logger, one_line
from cogvideo.tensor_file import TensorInfo, write_tensor_file
from cogvideo.training.optimiser import EMA
from cogvideo.training.state import TrainingState, tensor_hash

log = get_logger(__name__)

NAME = re.compile(r"step_(\d{8})")
LATEST, MANIFEST, NUMBERS = "latest", "manifest.json", "state.json"
FORMAT = 2
"""1 was DeepSpeed's own files."""
MAX_FILE_BYTES = 1 << 30
"""A rank holds the tensors of one file in memory while it writes them; a larger tensor gets a file of its own."""


class Manifest(TypedDict):
    """The keys of manifest.json that are read once its format has been checked."""

    step: Count
    files: dict[str, FileEntry]
    tensors: dict[str, str]
    frozen: dict[str, str]


class EngineCounters(TypedDict):
    """The values of `state.ENGINE_COUNTERS`."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count


class EngineNumbers(TypedDict):
    """What `TrainingState.numbers` returns."""

    engine: EngineCounters
    optimiser_steps: Count
    scaler: dict[str, bool | int | float]


class Inputs(TypedDict, total=False):
    """What `Task.inputs` returns."""

    tokenizers: dict[str, Any]
    pixel_mean: Annotated[list[float], Len(3, 3)]
    pixel_std: Annotated[list[float], Len(3, 3)]


class Numbers(TypedDict):
    """state.json."""

    step: Count
    skipped: Count
    bad_in_a_row: Count
    spikes: NotRequired[Count]
    norms: NotRequired[list[float]]
    averages: list[dict[str, Annotated[list[float], Len(2, 2)]]]
    config: dict[str, Any]
    inputs: NotRequired[Inputs]
    engine: EngineNumbers


def save_state(
    state: TrainingState,
    folder: Path,
    step: int,
    numbers: dict[str, Any],
    keep_last: int,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write a checkpoint after `step` steps, every rank its share of the files; remove all but the last `keep_last`.

    `numbers` is plain JSON, taken from rank 0.
    Raises: OSError on every rank if any of them cannot write; earlier checkpoints are then left as they are.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    is_first = dist.get_rank() == 0

    def start() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        temporary.mkdir()

    def finish() -> None:
        write_json(temporary / NUMBERS, numbers | {"engine": state.numbers()})
        files[NUMBERS] = {"sha256": sha256_file(temporary / NUMBERS), "size": (temporary / NUMBERS).stat().st_size}
        header = {"format": FORMAT, "step": step, "world": dist.get_world_size()}
        write_json(temporary / MANIFEST, header | {"files": files, "tensors": tensors, "frozen": frozen})
        _flush(temporary)
        swap_in(temporary, target)
        with atomic_write(folder / LATEST) as latest:
            latest.write_text(target.name + "\n", encoding="utf-8")
        saved = _saved(folder)
        index = saved.index(target)
        # later ones are damaged, or this run would have resumed from them
        for other in [*saved[index + 1 :], *saved[: index + 1][:-keep_last]]:
            _remove(other)

    frozen = state.frozen_hashes()
    try:
        run_on_all_ranks(start if is_first else None)
        files, tensors = _write_tensors(state, temporary, max_file_bytes)
        run_on_all_ranks(finish if is_first else None)
    except OSError:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)  # make room on a full disk
        raise
    return target


def _write_tensors(state: TrainingState, folder: Path, max_file_bytes: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Write all tensors. Every rank gathers them one by one, keeps those of its own files and writes them.

    Returns the manifest's entries for files and for tensors, the same on every rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    infos = state.infos()
    groups = _group_by_size(infos, max_file_bytes)
    files: dict[str, Any] = {}
    tensors: dict[str, str] = {}
    for begin in range(0, len(groups), world_size):  # rank r writes file begin + r
        own: dict[str, Tensor] = {}
        for writer, group in enumerate(groups[begin : begin + world_size]):
            for name in group:
                value = state.read(name)
                if writer == rank:
                    own[name] = value.detach().to("cpu", copy=True)

        def write(own: dict[str, Tensor] = own, number: int = begin + rank + 1) -> Any:
            path = folder / f"state-{number:05d}-of-{len(groups):05d}.safetensors"
            sha256 = write_tensor_file(path, {name: infos[name] for name in own}, own.__getitem__)
            hashes = {name: tensor_hash(tensor) for name, tensor in own.items()}
            return path.name, {"sha256": sha256, "size": path.stat().st_size}, hashes

        for written in run_on_all_ranks(write if own else None):
            if written is not None:
                file_name, file_entry, hashes = written
                files[file_name] = file_entry
                tensors |= hashes
    return dict(sorted(files.items())), {name: tensors[name] for name in infos}


def newest_state(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their hashes, or None if there are no checkpoints.

    Damaged ones are skipped with a warning. Rank 0 searches, and the others receive its result.
    Raises: ValueError if all are damaged, or one has another version's format; OSError if one cannot be read.
    """

    def find() -> tuple[Path | None, str]:
        problems: dict[Path, str] = {}
        for path in sorted((p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and p.is_dir()), reverse=True):
            try:
                _check_format(path)
                problem = _find_problem(path)
            except ValueError as error:
                return None, str(error)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{path} cannot be read: {one_line(error)}; try again, or move it away to do without it",
                ) from error
            if problem is None:
                for damaged, what in problems.items():
                    log.warning("%s is damaged (%s); falling back to the one before it", damaged, what)
                return path, ""
            problems[path] = problem
        if problems:
            found = "; ".join(f"{path.name}: {problem}" for path, problem in problems.items())
            return None, (
                f"{folder} holds no checkpoint that can be used ({found}); restore one from a copy, or remove that "
                "folder and --resume to train from the beginning"
            )
        return None, ""

    newest, problem = run_on_all_ranks(find if dist.get_rank() == 0 else None)[0] or (None, "")
    if problem:
        raise ValueError(problem)
    return newest


def load_state(state: TrainingState, path: Path, number_types: tuple[str, str] | None = None) -> dict[str, Any]:
    """Restore a checkpoint that `newest_state` found; returns the numbers that `save_state` was given.

    If it lacks averages of weights, they start from its weights; if this run keeps none, stored ones are ignored.
    `number_types`: the old and new settings of the type that weights are held in, if they differ.
    Raises: ValueError if it is of another model, or was trained with other frozen weights.
    """
    manifest: Manifest = read_json(path / MANIFEST, Manifest)
    numbers = saved_numbers(path)
    expected, stored = state.infos(), set(manifest["tensors"])
    averages = {name for name in expected.keys() | stored if name.startswith(f"{EMA}/")}
    if averages.isdisjoint(stored) or not state.has_ema:
        expected, stored = {name: info for name, info in expected.items() if name not in averages}, stored - averages
    for name in sorted(expected.keys() ^ stored):
        problem = f"it lacks {name}" if name in expected else f"it has {name}, which this run does not train"
        raise ValueError(f"{path} does not fit this run: {problem}; use the settings that the run started with")
    _check_frozen(state, manifest["frozen"], path, number_types)
    missing = set(expected)
    for name, value in _stored_tensors(path, manifest):
        if name in averages and name not in expected:
            continue
        if name not in missing or value.dtype.is_floating_point != expected[name].dtype.is_floating_point:
            raise ValueError(f"{path} is damaged: its files hold {name} twice, or as {value.dtype}")
        missing.remove(name)
        if tuple(value.shape) != expected[name].shape:
            raise ValueError(
                f"{path} does not fit this run: {name} has shape {tuple(value.shape)}, expected "
                f"{expected[name].shape}; use the settings that the run started with"
            )
        state.write(name, value)
    if missing:
        raise ValueError(f"{path} is damaged: its files do not hold {min(missing)}")
    if state.has_ema and averages.isdisjoint(expected):
        state.restart_ema()
    state.set_numbers(numbers["engine"])
    return numbers


def saved_numbers(path: Path) -> dict[str, Any]:
    """The numbers that `save_state` was given for a checkpoint which `newest_state` found; no tensor is read."""
    numbers: dict[str, Any] = read_json(path / NUMBERS, Numbers, allow_nan=True)
    return numbers


def resume_advice(folder: Path) -> str:
    """What the user can do after a failure, as the end of an error message."""
    try:
        newest = (folder / LATEST).read_bytes()[:64].decode("utf-8", "replace").strip()
    except OSError:
        return "nothing was saved yet; start again"
    return f"{newest} is saved; continue from it with --resume"


def _remove(path: Path) -> None:
    """Delete a checkpoint, renaming it first so that a kill midway leaves no partial checkpoint under its name."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def remove_unfinished(folder: Path) -> None:
    """Delete what is left of checkpoints if a run was killed while saving or deleting them."""
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover)


def _check_frozen(
    state: TrainingState, stored: dict[str, str], path: Path, number_types: tuple[str, str] | None
) -> None:
    """Raise unless the frozen weights, which a checkpoint lacks, are exactly those that it was trained with."""
    hashes = state.frozen_hashes()
    problem = None
    if dist.get_rank() == 0:
        problem = next((name for name in sorted(hashes.keys() | stored) if hashes.get(name) != stored.get(name)), None)
    problem = run_on_all_ranks((lambda: problem) if dist.get_rank() == 0 else None)[0]
    if problem is not None and number_types is not None:
        before, now = number_types
        raise ValueError(
            f"{path} was trained with {before}, and frozen weights are held in that type ({problem} differs); "
            f"this run has {now}; resume it with {before}"
        )
    if problem is not None:
        raise ValueError(
            f"{path} was trained with other frozen weights ({problem} differs); set init.checkpoint to what the run "
            "started from, of which export/trunk in its run folder is a copy, and init.trunk_weights as it was"
        )


def _stored_tensors(path: Path, manifest: Manifest) -> Iterable[tuple[str, Tensor]]:
    """All tensors of a checkpoint, memory-mapped, in the same order on every rank."""
    for file in sorted(name for name in manifest["files"] if name.endswith(".safetensors")):
        try:
            with torch_errors_as_os_errors(), safe_open(path / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, not a dict
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path / file} is damaged: {str(error)[:200]}") from None


def _group_by_size(infos: dict[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Consecutive names in groups of at most `max_bytes` (or one tensor)."""
    groups: list[list[str]] = [[]]
    group_bytes = 0
    for name, info in infos.items():
        if groups[-1] and group_bytes + info.nbytes > max_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(name)
        group_bytes += info.nbytes
    return groups


def _saved(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def _check_format(path: Path) -> None:
    """Raises: ValueError for a checkpoint of another version, which does not count as damaged; OSError."""
    try:
        version = read_json(path / MANIFEST, dict[str, Any]).get("format")
    except (ValueError, FileNotFoundError):
        return
    if type(version) is int and version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, from {'a newer' if version > FORMAT else 'an earlier'} version, expected "
            f"{FORMAT}; resume with the version that saved it, or move it away to do without it"
        )


def _find_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are as they were written. Raises: OSError."""
    if not (path / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        manifest = read_json(path / MANIFEST, dict[str, Any])
        if manifest.get("format") != FORMAT:
            return f"{MANIFEST} has no format"
        files = checked(manifest, Manifest, path / MANIFEST)["files"]
        if NUMBERS not in files:
            return f"{MANIFEST} does not list {NUMBERS}"
        for name, entry in files.items():
            file = path / name
            if Path(name).name != name:
                return f"{MANIFEST} names {name[:80]!r}, which is not in this folder"
            if not file.is_file() or file.stat().st_size != entry["size"] or sha256_file(file) != entry["sha256"]:
                return f"{name} has changed"
        read_json(path / NUMBERS, Numbers, allow_nan=True)
    except ValueError as error:
        return str(error)
    return None


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
