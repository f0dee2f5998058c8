"""Published checkpoint folders (SwissArmyTransformer, "SAT"): found, opened, told apart, merged. Writes nothing.

DIR/latest                                  an iteration number, or `release`
DIR/model_config.json                       sizes; not to be relied on for what the tensors say themselves
DIR/<iteration>/mp_rank_XX_model_states.pt  one file a model-parallel rank
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvideo.checkpoint.sat.archive import read_module
from cogvideo.checkpoint.sat.names import (
    EXTRA_POSITIONS,
    PARAMETERS,
    Kind,
    Parameter,
    Sizes,
    Split,
    expand,
    listed,
    today,
)
from cogvideo.checkpoint.sat.shard import merge, same_bits, whole_shape
from cogvideo.checkpoint.tensor_file import TensorInfo, parse_json

POSITIONS, QKV = "transformer.position_embeddings.weight", "transformer.layers.0.attention.query_key_value.weight"
MAX_CONFIG_BYTES = 1 << 20
ITERATION = re.compile(r"\d{1,12}|release")
MAX_NESTING = 4
MAX_RANKS = 1024
RELEASE_BYTES = 256 << 20
"""Mapped pages count as our memory once touched; after so many, the files are mapped afresh."""


class SatCheckpoint:
    """An opened folder: what it holds in all, and its tensors, whole, one at a time.

    Raises on opening: FileNotFoundError or ValueError, in one line that names the file or tensors.
    """

    def __init__(self, directory: Path, *, drop: Iterable[str] = ()) -> None:
        self.directory = find_sat_directory(Path(directory))
        self.iteration = _read_latest(self.directory / "latest")
        self.model_config = _read_model_config(self.directory / "model_config.json")
        self.paths = _find_ranks(self.directory / self.iteration)
        self._ranks = [read_module(path) for path in self.paths]
        self._touched = 0
        self.names, self.dropped = self._rename(tuple(drop))
        """`names`: present SAT name -> the name in the files; `dropped`: name in the files -> why."""
        self._check_all_ranks_are_here()
        self.kind = tell_kind(self.names)
        self.sizes = self._measure()
        self.parameters = expand(self.kind, self.sizes.num_layers)
        self.infos = self._check()
        """Type and shape of every whole tensor by our name, in the files' order."""

    def read(self, parameter: Parameter) -> Tensor:
        """One whole tensor, merged from all ranks."""
        if self._touched > RELEASE_BYTES:
            self._ranks = [read_module(path) for path in self.paths]
            self._touched = 0
        stored = self.names[parameter.sat]
        parts = [rank[stored] for rank in self._ranks]
        self._touched += sum(part.nbytes for part in parts)
        return merge(parts, parameter.split)

    def differing_copies(self) -> list[str]:
        """Names, as in the files, of tensors that every rank should hold alike and does not; `read` takes rank 0's."""
        shared = [self.names[p.sat] for p in self.parameters if p.split is Split.REPLICATED]
        return [name for name in shared if any(not same_bits(rank[name], self._ranks[0][name]) for rank in self._ranks)]

    def _rename(self, drop: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
        names: dict[str, str] = {}
        dropped: dict[str, str] = {}
        first = self._ranks[0]
        for path, rank in zip(self.paths, self._ranks, strict=True):
            if rank.keys() != first.keys():
                raise ValueError(f"{path} does not hold the tensors of rank 0: {listed(rank.keys() ^ first.keys())}")
        for stored in first:
            name = today(stored)
            if stored in drop:
                dropped[stored] = "asked for by --drop"
            elif name is None:
                dropped[stored] = "of no use in today's models"
            elif name in names:
                raise ValueError(f"{self.paths[0]} holds {name} twice, as {names[name]} and as {stored}")
            else:
                names[name] = stored
        for name in drop:
            if name not in first:
                raise ValueError(f"--drop {name}: there is no such tensor in {self.paths[0]}")
        return names, dropped

    def _check_all_ranks_are_here(self) -> None:
        """By shapes: model_parallel_size in model_config.json outlives merging and cutting.

        Raises: FileNotFoundError, naming the first rank's file that is not there.
        """
        hidden_size = self._rows(POSITIONS)[1]
        cut = max(self._rows(QKV)[0], 1)
        ranks = 3 * hidden_size // cut
        if ranks * cut == 3 * hidden_size and len(self.paths) < ranks <= MAX_RANKS:
            missing = self.paths[0].with_name(f"mp_rank_{len(self.paths):02d}_model_states.pt")
            raise FileNotFoundError(f"{missing} is missing, the others' shapes are those of {ranks} ranks")

    def _rows(self, name: str) -> tuple[int, ...]:
        if name not in self.names:
            raise ValueError(f"{self.paths[0]} has no {name}, which every model of CogVideo and CogView2 has")
        shape = tuple(self._ranks[0][self.names[name]].shape)
        if len(shape) != 2:
            raise ValueError(f"{self.paths[0]}: {name} has shape {list(shape)}, expected rows and columns")
        return shape

    def _measure(self) -> Sizes:
        layers = [int(m[1]) for m in (re.match(r"transformer\.layers\.(\d{1,4})\.", name) for name in self.names) if m]
        num_positions, hidden_size = self._rows(POSITIONS)
        extra = self._rows(EXTRA_POSITIONS.sat)[0] if EXTRA_POSITIONS in PARAMETERS[self.kind] else 0
        return Sizes(
            num_layers=max(layers, default=-1) + 1,
            hidden_size=hidden_size,
            vocabulary=self._rows("transformer.word_embeddings.weight")[0] * len(self.paths),
            num_positions=num_positions,
            num_extra_positions=extra,
        )

    def _check(self) -> dict[str, TensorInfo]:
        by_sat = {parameter.sat: parameter for parameter in self.parameters}
        unknown = {self.names[name] for name in self.names.keys() - by_sat.keys()}
        if unknown:
            raise ValueError(
                f"{self.paths[0]} holds tensors that no {self.kind} model has: {listed(unknown)}; "
                "if you know that they are not needed, name each with --drop"
            )
        missing = by_sat.keys() - self.names.keys()
        if missing:
            raise ValueError(f"{self.paths[0]} lacks tensors of a {self.kind} model: {listed(missing)}")
        infos: dict[str, TensorInfo] = {}
        for sat_name, stored in self.names.items():
            parameter = by_sat[sat_name]
            parts = [rank[stored] for rank in self._ranks]
            expected = self.sizes.of(parameter)
            for path, part in zip(self.paths, parts, strict=True):
                shape = whole_shape(tuple(part.shape), parameter.split, len(parts))
                if shape != expected or not part.dtype.is_floating_point or part.dtype != parts[0].dtype:
                    wanted = f"{list(expected)} in all over {len(parts)} rank(s)"
                    raise ValueError(f"{path}: {stored} is {TensorInfo.of(part)}, expected {wanted}, equal types")
            infos[parameter.name] = TensorInfo(parts[0].dtype, expected)
        return infos


def tell_kind(names: Iterable[str]) -> Kind:
    """Which structure a model has, from the (present SAT) names of its tensors.

    CogVideo's two stages have the same names and shapes; nothing in the tensors tells them apart.
    """
    names = set(names)
    if any(name.startswith("mixins.attention_plus.attn_distribution.") for name in names):
        return "video"
    if any(name.startswith("mixins.attention_plus.") for name in names):
        return "direct_superres"
    return "iterative_superres" if EXTRA_POSITIONS.sat in names else "image"


def is_sat(directory: Path) -> bool:
    """Whether a folder is a SAT checkpoint's, without looking further down."""
    return (directory / "latest").is_file()


def find_sat_directory(directory: Path) -> Path:
    """The folder that holds `latest`: the one given, one inside it (archives nest), or the parent of an iteration's."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder at {directory}; give the one that holds the checkpoint's `latest`")
    if is_sat(directory):
        return directory
    if is_sat(directory.parent) and any(directory.glob("mp_rank_*_model_states.pt")):
        return directory.parent
    patterns = ["/".join(["*"] * depth + ["latest"]) for depth in range(1, MAX_NESTING + 1)]
    found = sorted(path.parent for pattern in patterns for path in directory.glob(pattern) if path.is_file())
    if not found:
        raise FileNotFoundError(f"no `latest` in {directory} or below; a SAT checkpoint has one beside its iterations")
    if len(found) > 1:
        raise ValueError(f"{directory} holds {len(found)} checkpoints: {', '.join(map(str, found[:4]))}; give one")
    return found[0]


def _read_latest(path: Path) -> str:
    with open(path, "rb") as file:
        text = file.read(64).decode("ascii", "replace").strip()
    if not ITERATION.fullmatch(text):
        raise ValueError(f"{path} holds {text[:40]!r}, expected an iteration number or `release`")
    return text


def _read_model_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MAX_CONFIG_BYTES}; it is no model_config")
    config = parse_json(path.read_bytes(), path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return config


def _find_ranks(folder: Path) -> list[Path]:
    paths = {int(m[1]): path for path in folder.glob("*.pt") if (m := re.fullmatch(r"mp_rank_(\d{2,4})_.*", path.stem))}
    if not paths:
        raise FileNotFoundError(f"{folder} holds no mp_rank_XX_model_states.pt; `latest` points to it")
    count = max(paths) + 1
    missing = [rank for rank in range(count) if rank not in paths]
    if missing:
        raise FileNotFoundError(f"{folder / f'mp_rank_{missing[0]:02d}_model_states.pt'} is missing, of {count} ranks")
    return [paths[rank] for rank in range(count)]
