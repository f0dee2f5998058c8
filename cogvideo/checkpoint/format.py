"""Our checkpoint folder, for any model: safetensors (one file, or shards and an index), config.json, manifest.json.

    config.json      {"format": 1, "config": settings, "extra": anything else, "trunk": see below}
    model.safetensors, or model-00001-of-000NN.safetensors ... and model.safetensors.index.json
    manifest.json    {"files": {name: {"sha256", "size"}}} of all of the above

A stage with a frozen trunk need not store it: `"trunk": {"path": "../trunk", "sha256": ...}` points to the checkpoint
that has it, in the same parent folder. The hash is that of the trunk's manifest, so it covers all of the trunk's files.

A folder is written under a temporary name and renamed, so a folder that exists is complete. Files are not trusted:
sizes are bounded, names cannot leave the folder, hashes are checked, and damage raises a one-line ValueError.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NotRequired

from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from cogvideo.files import (
    Count,
    atomic_directory,
    checked,
    read_json,
    sha256_file,
    torch_errors_as_os_errors,
    write_json,
)
from cogvideo.tensor_file import TensorInfo, read_header, write_tensor_file

WEIGHTS, INDEX, CONFIG, MANIFEST = "model.safetensors", "model.safetensors.index.json", "config.json", "manifest.json"
CARD = "README.md"
FORMAT = 1
MAX_SHARD_BYTES = 4 << 30
MAX_JSON_BYTES = 16 << 20
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class FileEntry(TypedDict):
    """A file in a manifest."""

    sha256: str
    size: Count


class Manifest(TypedDict):
    """manifest.json."""

    files: dict[str, FileEntry]


class TrunkPointer(TypedDict):
    """The location of a trunk that a stage does not store itself."""

    path: str
    sha256: str


class StoredConfig(TypedDict):
    """config.json."""

    format: int
    config: dict[str, Any]
    extra: dict[str, Any]
    trunk: NotRequired[TrunkPointer | None]


class Index(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


class Checkpoint:
    """An open checkpoint: its config, and its tensors, memory-mapped on demand."""

    def __init__(self, directory: Path, config: dict[str, Any], extra: dict[str, Any], trunk: "Checkpoint | None"):
        self.directory = directory
        self.config = config
        self.extra = extra
        self.trunk = trunk
        """The checkpoint with the frozen trunk, if this one does not store it; its tensors are included in `infos`."""
        self.infos: dict[str, TensorInfo] = dict(trunk.infos) if trunk else {}
        """Type and shape of every tensor, from the headers."""
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> list[str]:
        return list(self.infos)

    def tensor(self, name: str) -> Tensor:
        """One tensor, backed by the memory-mapped file: nothing is copied, pages are read on first access."""
        if name not in self.infos:
            raise ValueError(f"{self.directory} has no tensor {name} among its {len(self.infos)}")
        if name not in self._file_of:
            assert self.trunk is not None
            return self.trunk.tensor(name)
        path = self._file_of[name]
        try:
            if path not in self._open:
                with torch_errors_as_os_errors():
                    self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {str(error)[:200]}") from None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, including the trunk's."""
        return {name: self.tensor(name) for name in self.infos}

    def release(self) -> None:
        """Unmap the files: pages that were read no longer count as our memory, except those of tensors still in use."""
        self._open.clear()
        if self.trunk is not None:
            self.trunk.release()

    def _add(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        for name, info in infos.items():
            if name in self.infos:
                raise ValueError(f"{path} holds the tensor {name}, which another file of {self.directory} holds too")
            self.infos[name] = info
            self._file_of[name] = path


def save_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    *,
    extra: dict[str, Any] | None = None,
    trunk: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint folder. An existing checkpoint is replaced once the new one is complete.

    `config` and `extra` must be plain JSON. `trunk` is the checkpoint that holds the tensors left out here.
    Raises: FileExistsError if the folder holds something other than a checkpoint, or other files beside one.
    """
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    write_checkpoint(
        directory, infos, tensors.__getitem__, config, extra=extra, trunk=trunk, max_shard_bytes=max_shard_bytes
    )


def write_checkpoint(
    directory: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    config: dict[str, Any],
    *,
    extra: dict[str, Any] | None = None,
    trunk: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    other_files: Mapping[str, str] | None = None,
) -> None:
    """Like `save_checkpoint`, but get tensors from `read` one at a time, so only one is in memory at once.

    `other_files`: text files by name, such as a model card; not in the manifest, because users edit them.
    """
    directory = Path(directory)
    trunk_pointer = None if trunk is None else _make_trunk_pointer(directory, Path(trunk))
    shards = _split_into_shards(infos, max_shard_bytes)
    with atomic_directory(directory, replace=_is_only_checkpoint(directory)) as building:
        files: dict[str, dict[str, Any]] = {}

        def add_to_manifest(name: str, sha256: str | None = None) -> None:
            path = building / name
            files[name] = {"sha256": sha256 or sha256_file(path), "size": path.stat().st_size}

        for name, shard in shards.items():
            add_to_manifest(name, write_tensor_file(building / name, shard, read))
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
            total = sum(info.nbytes for info in infos.values())
            write_json(building / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            add_to_manifest(INDEX)
        content = {"format": FORMAT, "config": config, "extra": extra or {}}
        write_json(building / CONFIG, content if trunk_pointer is None else content | {"trunk": trunk_pointer})
        add_to_manifest(CONFIG)
        for name, text in (other_files or {}).items():
            (building / name).write_text(text, encoding="utf-8")
        write_json(building / MANIFEST, {"files": files})


def _is_only_checkpoint(directory: Path) -> bool:
    """Whether a folder holds a checkpoint, perhaps with its card, and nothing else that replacing it would delete.

    Raises: FileExistsError for other files beside a checkpoint.
    """
    try:
        files = read_json(directory / MANIFEST, Manifest, max_bytes=MAX_JSON_BYTES)["files"]
    except (OSError, ValueError):
        return False
    if CONFIG not in files:
        return False
    own = {*files, MANIFEST, CARD}
    others = sorted(path.name for path in directory.iterdir() if path.name not in own and path.name[0] != ".")
    if others:
        raise FileExistsError(
            f"{directory} holds {others[0][:80]} beside a checkpoint, which would be removed with it; move it away, or "
            "choose another folder"
        )
    return True


def load_checkpoint(directory: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint folder and its trunk. `verify` checks every file's hash; sizes and headers are always checked.

    Raises: FileNotFoundError if it is not a checkpoint; ValueError, in one line, if anything in it is damaged.
    """
    return _load(Path(directory), verify, allow_trunk=True)


def _load(directory: Path, verify: bool, allow_trunk: bool) -> Checkpoint:
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {directory}; give the folder that holds {CONFIG}")
    if not (directory / MANIFEST).is_file():
        looks_like_sat = (directory / "latest").is_file()
        hint = "it looks like a SAT checkpoint: run `cogvideo convert`" if looks_like_sat else "give another folder"
        raise FileNotFoundError(f"{directory} is not a cogvideo checkpoint, it has no {MANIFEST}; {hint}")
    files = read_json(directory / MANIFEST, Manifest, max_bytes=MAX_JSON_BYTES)["files"]
    _check_file(directory, CONFIG, files, verify)
    content = read_json(directory / CONFIG, dict[str, Any], max_bytes=MAX_JSON_BYTES)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{directory / CONFIG} has format {content.get('format')!r:.40}, this version reads {FORMAT}; "
            "update cogvideo"
        )
    content = checked(content, StoredConfig, directory / CONFIG)
    config, extra, trunk_pointer = content["config"], content["extra"], content.get("trunk")
    trunk = None
    if trunk_pointer is not None:
        if not allow_trunk:
            raise ValueError(f"{directory} is a trunk that points to another trunk; a trunk must be complete")
        trunk = _load_trunk(directory, trunk_pointer, verify)
    checkpoint = Checkpoint(directory, config, extra, trunk)

    if INDEX in files:
        _check_file(directory, INDEX, files, verify)
        weight_map = read_json(directory / INDEX, Index, max_bytes=MAX_JSON_BYTES)["weight_map"]
    else:
        weight_map = None
    for name in [WEIGHTS] if weight_map is None else sorted(set(weight_map.values())):
        if not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{directory / INDEX} names the file {name[:200]!r}, which is not a shard of this folder")
        _check_file(directory, name, files, verify)
        infos = read_header(directory / name)
        if weight_map is not None:
            in_index = {tensor for tensor, file in weight_map.items() if file == name}
            for tensor in sorted(in_index ^ infos.keys()):
                where = "index but not in it" if tensor in in_index else "it but not in the index"
                raise ValueError(f"{directory / name} is damaged: tensor {tensor[:200]!r} is in the {where}")
        checkpoint._add(directory / name, infos)
    return checkpoint


def _split_into_shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """File name -> consecutive tensors; a tensor larger than `max_bytes` is a shard of its own."""
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in infos.items():
        if groups[-1] and filled + info.nbytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _check_file(directory: Path, name: str, files: dict[str, FileEntry], verify: bool) -> None:
    """Compare a file with its entry in the manifest."""
    path, entry = directory / name, files.get(name)
    if entry is None:
        raise ValueError(f"{directory / MANIFEST} is damaged: it has no size and sha256 of {name}")
    size, sha256 = entry["size"], entry["sha256"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, {MANIFEST} lists it; fetch the checkpoint again")
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {size}; fetch or write it again")
    if verify and sha256_file(path) != sha256:
        raise ValueError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}; fetch or write it again")


def _make_trunk_pointer(directory: Path, trunk: Path) -> dict[str, str]:
    parent, target = directory.resolve().parent, trunk.resolve()
    if not target.is_relative_to(parent) or target == parent:
        raise ValueError(f"the trunk {trunk} is not inside {parent}; a stage and its trunk must be in the same folder")
    if not (target / MANIFEST).is_file():
        raise FileNotFoundError(f"{trunk} is not a checkpoint, it has no {MANIFEST}; save the trunk first")
    return {"path": f"../{target.relative_to(parent).as_posix()}", "sha256": sha256_file(target / MANIFEST)}


def _load_trunk(directory: Path, pointer: TrunkPointer, verify: bool) -> Checkpoint:
    config_path = directory / CONFIG
    directory = directory.resolve()
    path = pointer["path"]
    target = (directory / path).resolve() if "\0" not in path and len(path) < 1024 else directory
    is_beside = target.is_relative_to(directory.parent) and target not in (directory, directory.parent)
    if Path(path).is_absolute() or not is_beside:
        raise ValueError(
            f"{config_path} points to the trunk {path[:200]!r}, which is not beside it in {directory.parent}"
        )
    if not (target / MANIFEST).is_file():
        raise FileNotFoundError(f"{config_path} needs its trunk at {target}, which is missing; put the trunk there")
    if sha256_file(target / MANIFEST) != pointer["sha256"]:
        raise ValueError(f"the trunk at {target} is not the one that {config_path} was saved with; put that one there")
    return _load(target, verify, allow_trunk=False)
