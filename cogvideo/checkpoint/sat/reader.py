"""Read published checkpoint folders (SwissArmyTransformer, "SAT"): find, open and check them, merge ranks. No writing.

DIR/latest                                  an iteration number, or `release`
DIR/model_config.json                       settings; sizes that tensor shapes imply are taken from the shapes
DIR/cogvideo.json                           all of our settings for the model; only in folders that we wrote
DIR/<iteration>/mp_rank_XX_model_states.pt  one file per model-parallel rank
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvideo.checkpoint.parameters import (
    EXTRA_POSITIONS,
    PARAMETERS,
    Parameter,
    Sizes,
    Split,
    model_parameters,
    name_list,
)
from cogvideo.checkpoint.sat.names import canonical_sat_name, kind_from_names
from cogvideo.checkpoint.sat.shard import merge, same_bits, whole_shape
from cogvideo.files import read_json
from cogvideo.tensor_file import TensorInfo
from cogvideo.torch_archive import read_module

POSITIONS, QKV = "transformer.position_embeddings.weight", "transformer.layers.0.attention.query_key_value.weight"
SAT_CONFIG, OWN_CONFIG = "model_config.json", "cogvideo.json"
MAX_CONFIG_BYTES = 1 << 20
ITERATION = re.compile(r"\d{1,12}|release")
MAX_NESTING = 4
MAX_RANKS = 1024
RELEASE_BYTES = 256 << 20
"""Mapped pages count as our memory once read; after this many bytes the files are unmapped and mapped again."""


class SatCheckpoint:
    """An open checkpoint folder: the merged tensors' names, types and shapes, and the tensors, read one at a time.

    Raises on opening: FileNotFoundError or ValueError, in one line that names the file or tensors.
    """

    def __init__(self, directory: Path, *, drop: Iterable[str] = ()) -> None:
        self.directory = find_sat_directory(Path(directory))
        self.iteration = _read_latest(self.directory / "latest")
        self.model_config = _read_config(self.directory / SAT_CONFIG)
        self.own_config = _read_config(self.directory / OWN_CONFIG)
        """{"model": ...} or {"superres": ...} if we wrote the folder, else {}."""
        self.paths = _find_ranks(self.directory / self.iteration)
        self._ranks = [read_module(path) for path in self.paths]
        self._touched = 0
        self.names, self.dropped = self._rename(tuple(drop))
        """`names`: canonical SAT name -> name in the files; `dropped`: name in the files -> reason."""
        self._check_no_rank_is_missing()
        self.kind = kind_from_names(self.names)
        self.sizes = self._measure()
        self.parameters = model_parameters(self.kind, self.sizes.num_layers)
        self.infos = self._check_tensors()
        """Type and shape of every merged tensor by our name, in the files' order."""

    def read(self, parameter: Parameter) -> Tensor:
        """One tensor, merged from all ranks."""
        if self._touched > RELEASE_BYTES:
            self._ranks = [read_module(path) for path in self.paths]
            self._touched = 0
        stored = self.names[parameter.sat_name]
        shards = [rank[stored] for rank in self._ranks]
        self._touched += sum(shard.nbytes for shard in shards)
        return merge(shards, parameter.split)

    def differing_copies(self) -> list[str]:
        """Names, as in the files, of replicated tensors that differ between ranks; `read` returns rank 0's."""
        shared = [self.names[p.sat_name] for p in self.parameters if p.split is Split.REPLICATED]
        return [name for name in shared if any(not same_bits(rank[name], self._ranks[0][name]) for rank in self._ranks)]

    def _rename(self, drop: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
        names: dict[str, str] = {}
        dropped: dict[str, str] = {}
        first = self._ranks[0]
        for path, rank in zip(self.paths, self._ranks, strict=True):
            if rank.keys() != first.keys():
                difference = name_list(rank.keys() ^ first.keys())
                raise ValueError(f"{path} does not hold the same tensors as rank 0: {difference}")
        for stored in first:
            name = canonical_sat_name(stored)
            if stored in drop:
                dropped[stored] = "asked for by --drop"
            elif name is None:
                dropped[stored] = "not used by current models"
            elif name in names:
                raise ValueError(f"{self.paths[0]} holds {name} twice, as {names[name]} and as {stored}")
            else:
                names[name] = stored
        for name in drop:
            if name not in first:
                raise ValueError(f"--drop {name}: there is no such tensor in {self.paths[0]}")
        return names, dropped

    def _check_no_rank_is_missing(self) -> None:
        """Derive the number of ranks from shapes: model_parallel_size in model_config.json may be out of date.

        Raises: FileNotFoundError that names the first missing file.
        """
        hidden_size = self._matrix_shape(POSITIONS)[1]
        shard_rows = max(self._matrix_shape(QKV)[0], 1)
        ranks = 3 * hidden_size // shard_rows
        if ranks * shard_rows == 3 * hidden_size and len(self.paths) < ranks <= MAX_RANKS:
            missing = self.paths[0].with_name(f"mp_rank_{len(self.paths):02d}_model_states.pt")
            raise FileNotFoundError(f"{missing} is missing, the shapes are those of {ranks} ranks; fetch it")

    def _matrix_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.names:
            raise ValueError(f"{self.paths[0]} has no {name}, which every model of CogVideo and CogView2 has")
        shape = tuple(self._ranks[0][self.names[name]].shape)
        if len(shape) != 2:
            raise ValueError(f"{self.paths[0]}: {name} has shape {list(shape)}, expected rows and columns")
        return shape

    def _measure(self) -> Sizes:
        layers = [int(m[1]) for m in (re.match(r"transformer\.layers\.(\d{1,4})\.", name) for name in self.names) if m]
        num_positions, hidden_size = self._matrix_shape(POSITIONS)
        extra = self._matrix_shape(EXTRA_POSITIONS.sat_name)[0] if EXTRA_POSITIONS in PARAMETERS[self.kind] else 0
        return Sizes(
            num_layers=max(layers, default=-1) + 1,
            hidden_size=hidden_size,
            vocabulary=self._matrix_shape("transformer.word_embeddings.weight")[0] * len(self.paths),
            num_positions=num_positions,
            num_extra_positions=extra,
        )

    def _check_tensors(self) -> dict[str, TensorInfo]:
        by_sat_name = {parameter.sat_name: parameter for parameter in self.parameters}
        unknown = {self.names[name] for name in self.names.keys() - by_sat_name.keys()}
        if unknown:
            raise ValueError(
                f"{self.paths[0]} holds tensors that no {self.kind} model has: {name_list(unknown)}; "
                "if they are not needed, name each with --drop"
            )
        missing = by_sat_name.keys() - self.names.keys()
        if missing:
            raise ValueError(f"{self.paths[0]} lacks tensors of a {self.kind} model: {name_list(missing)}")
        infos: dict[str, TensorInfo] = {}
        for sat_name, stored in self.names.items():
            parameter = by_sat_name[sat_name]
            shards = [rank[stored] for rank in self._ranks]
            dtype, expected = shards[0].dtype, self.sizes.shape_of(parameter)
            for path, shard in zip(self.paths, shards, strict=True):
                shape = whole_shape(tuple(shard.shape), parameter.split, len(shards))
                if shape != expected or not shard.dtype.is_floating_point or shard.dtype != dtype:
                    raise ValueError(
                        f"{path}: {stored} is {TensorInfo.of(shard)}, expected floats of shape {list(expected)} in all "
                        f"over {len(shards)} rank(s), the same type on each"
                    )
            infos[parameter.name] = TensorInfo(dtype, expected)
        return infos


def is_sat(directory: Path) -> bool:
    """Whether a folder itself (not one below it) is a SAT checkpoint."""
    return (directory / "latest").is_file()


def find_sat_directory(directory: Path) -> Path:
    """The folder with `latest`: `directory`, one below it (archives nest), or the parent of an iteration's folder."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder at {directory}; give the folder that holds the checkpoint's `latest`")
    if is_sat(directory):
        return directory
    if is_sat(directory.parent) and any(directory.glob("mp_rank_*_model_states.pt")):
        return directory.parent
    patterns = ["/".join(["*"] * depth + ["latest"]) for depth in range(1, MAX_NESTING + 1)]
    found = sorted(path.parent for pattern in patterns for path in directory.glob(pattern) if path.is_file())
    if not found:
        raise FileNotFoundError(f"no `latest` in {directory} or below; give the folder of a SAT checkpoint")
    if len(found) > 1:
        raise ValueError(f"{directory} holds {len(found)} checkpoints: {', '.join(map(str, found[:4]))}; give one")
    return found[0]


def _read_latest(path: Path) -> str:
    with open(path, "rb") as file:
        text = file.read(64).decode("ascii", "replace").strip()
    if not ITERATION.fullmatch(text):
        raise ValueError(f"{path} holds {text[:40]!r}, expected an iteration number or `release`")
    return text


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config: dict[str, Any] = read_json(path, dict[str, Any], max_bytes=MAX_CONFIG_BYTES)
    return config


def _find_ranks(folder: Path) -> list[Path]:
    paths = {int(m[1]): path for path in folder.glob("*.pt") if (m := re.fullmatch(r"mp_rank_(\d{2,4})_.*", path.stem))}
    if not paths:
        raise FileNotFoundError(f"{folder} holds no mp_rank_XX_model_states.pt; `latest` points to it")
    count = max(paths) + 1
    missing = [rank for rank in range(count) if rank not in paths]
    if missing:
        path = folder / f"mp_rank_{missing[0]:02d}_model_states.pt"
        raise FileNotFoundError(f"{path} is missing, one of {count} ranks; fetch it")
    return [paths[rank] for rank in range(count)]
