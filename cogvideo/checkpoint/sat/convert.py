"""SAT checkpoints to ours and back, one tensor in memory at a time. What maps to what is in `names.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo.checkpoint.describe import Description, check_fits, describe, kind_of
from cogvideo.checkpoint.format import MAX_SHARD_BYTES, Checkpoint, load_checkpoint, write_checkpoint
from cogvideo.checkpoint.sat.archive import check_archive, write_module
from cogvideo.checkpoint.sat.card import model_card
from cogvideo.checkpoint.sat.config import SatSettings, config_for
from cogvideo.checkpoint.sat.names import Parameter, expand, listed
from cogvideo.checkpoint.sat.reader import ITERATION, RELEASE_BYTES, SatCheckpoint
from cogvideo.checkpoint.sat.shard import part_of, part_shape
from cogvideo.checkpoint.tensor_file import TensorInfo
from cogvideo.files import atomic_directory, sha256_file, write_json
from cogvideo.logs import get_logger
from cogvideo.model.config import ModelConfig


@dataclass(frozen=True)
class Mapped:
    """One line of a conversion's account: a tensor of the source and what becomes of it."""

    source: str
    target: str | None
    """None: dropped."""
    info: TensorInfo | None
    """As written; None if dropped."""
    reason: str = ""

    def __str__(self) -> str:
        return (
            f"{self.source} -> {self.target}  {self.info}" if self.target else f"{self.source} dropped: {self.reason}"
        )


@dataclass(frozen=True)
class Conversion:
    """A conversion that was checked and can be run. `run` writes; nothing is on disk before."""

    kind: str
    config: dict[str, Any]
    account: list[Mapped]
    run: Callable[[Callable[[], Any]], None]
    """Takes a callback, called for each of `num_writes` tensors as it is written."""
    num_writes: int

    @property
    def parameters(self) -> int:
        return sum(line.info.numel for line in self.account if line.info)

    @property
    def nbytes(self) -> int:
        return sum(line.info.nbytes for line in self.account if line.info)


def from_sat(
    source: Path,
    out: Path,
    settings: SatSettings | None = None,
    *,
    dtype: torch.dtype | None = None,
    drop: tuple[str, ...] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Conversion:
    """Plan the conversion of a published checkpoint; every one of its tensors is mapped, dropped or an error.

    Raises: ValueError, FileNotFoundError, in one line that names what is wrong.
    """
    sat = SatCheckpoint(Path(source), drop=drop)
    config = config_for(sat, settings or SatSettings())
    by_sat = {parameter.sat: parameter for parameter in sat.parameters}
    in_file_order = [by_sat[name] for name in sat.names]
    infos = {p.name: TensorInfo(dtype or sat.infos[p.name].dtype, sat.infos[p.name].shape) for p in in_file_order}
    account = [Mapped(sat.names[p.sat], p.name, infos[p.name]) for p in in_file_order]
    account += [Mapped(name, None, None, reason) for name, reason in sat.dropped.items()]

    def run(tick: Callable[[], Any]) -> None:
        hashes = {}
        for path in sat.paths:
            check_archive(path, checksums=True)
            hashes[f"{sat.iteration}/{path.name}"] = sha256_file(path)
        differing = sat.differing_copies()
        if differing:
            get_logger().warning(
                f"{len(differing)} tensors differ between ranks that should hold them alike; "
                f"rank 0's are kept: {listed(differing)}"
            )
        by_name = {p.name: p for p in in_file_order}

        def read(name: str) -> Tensor:
            tick()
            return sat.read(by_name[name])

        write_checkpoint(
            Path(out),
            infos,
            read,
            config,
            extra={"sat": {"iteration": sat.iteration, "model_config": sat.model_config, "sha256": hashes}},
            max_shard_bytes=max_shard_bytes,
            other_files={"README.md": model_card(conversion, sat, hashes, differing)},
        )

    conversion = Conversion(sat.kind, config, account, run, len(infos))
    return conversion


def to_sat(source: Path, out: Path, *, dtype: torch.dtype | None = None, ranks: int = 1) -> Conversion:
    """Plan the way back: a checkpoint of ours (trunk merged in) as a SAT folder, cut over `ranks` if asked.

    Raises: ValueError, FileNotFoundError, in one line that names what is wrong.
    """
    if ranks < 1:
        raise ValueError(f"cannot cut a checkpoint over {ranks} ranks; give a number of at least 1")
    checkpoint = load_checkpoint(Path(source))
    config = describe(checkpoint)
    check_fits(checkpoint, config)
    by_name = {parameter.name: parameter for parameter in expand(kind_of(config), config.num_layers)}
    ordered = [by_name[name] for name in checkpoint.names]
    whole = {name: TensorInfo(dtype or info.dtype, info.shape) for name, info in checkpoint.infos.items()}
    parts = {p.sat: TensorInfo(whole[p.name].dtype, part_shape(whole[p.name].shape, p.split, ranks)) for p in ordered}
    account = [Mapped(p.name, p.sat, whole[p.name]) for p in ordered]

    def run(tick: Callable[[], Any]) -> None:
        iteration, said = _origin(checkpoint)
        with atomic_directory(Path(out)) as building:
            (building / iteration).mkdir()
            for rank in range(ranks):
                write_module(
                    building / iteration / f"mp_rank_{rank:02d}_model_states.pt",
                    parts,
                    _reader(checkpoint, {p.sat: p for p in ordered}, rank, ranks, tick),
                    {"iteration": int(iteration) if iteration.isdigit() else 0},
                )
            said = (said or _model_config(config)) | {"model_parallel_size": ranks}
            write_json(building / "model_config.json", said)
            (building / "latest").write_text(iteration)

    return Conversion(kind_of(config), checkpoint.config, account, run, len(parts) * ranks)


def _reader(
    checkpoint: Checkpoint, by_sat: dict[str, Parameter], rank: int, ranks: int, tick: Callable[[], Any]
) -> Callable[[str], Tensor]:
    """Reads one rank's part of a tensor by SAT name, and lets go of mapped pages now and then."""
    touched = 0

    def read(sat_name: str) -> Tensor:
        nonlocal touched
        if touched > RELEASE_BYTES:
            checkpoint.release()
            touched = 0
        parameter = by_sat[sat_name]
        whole = checkpoint.tensor(parameter.name)
        part = part_of(whole, parameter.split, rank, ranks)
        touched += whole.nbytes  # cutting columns touches every page
        tick()
        return part

    return read


def _origin(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """The iteration and model_config.json that a converted checkpoint came with; `release` and nothing for ours."""
    sat = checkpoint.extra.get("sat")
    sat = sat if isinstance(sat, dict) else {}
    iteration, said = sat.get("iteration"), sat.get("model_config")
    if not isinstance(iteration, str) or not ITERATION.fullmatch(iteration):
        iteration = "release"
    return iteration, said if isinstance(said, dict) else {}


def _model_config(config: Description) -> dict[str, Any]:
    """A model_config.json for a model of our own making, with the keys that the published ones have."""
    said: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocabulary.size,
        "layernorm_order": "sandwich",
        "max_sequence_length": config.num_positions,
    }
    if isinstance(config, ModelConfig):
        ends = (0, 1, config.layout.num_frames)
        said["layout"] = sorted({config.text_len + frames * config.frame_len for frames in ends})
        if config.has_temporal_channel:
            said["window_size"] = config.window_size or -1
            said["additional_seqlen"] = config.num_extra_positions
            said["cogvideo_stage"] = 1 if config.task == "sequential" else 2
    return said
