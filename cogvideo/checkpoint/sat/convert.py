"""SAT checkpoints to ours and back, with one tensor in memory at a time. Both functions plan; `Conversion.run` writes.

The mapping of names is in `cogvideo.checkpoint.parameters`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo.checkpoint.format import CARD, MAX_SHARD_BYTES, Checkpoint, load_checkpoint, write_checkpoint
from cogvideo.checkpoint.load import check_fits, stored_config
from cogvideo.checkpoint.parameters import Parameter, TransformerConfig, model_kind, model_parameters, name_list
from cogvideo.checkpoint.sat.card import model_card
from cogvideo.checkpoint.sat.config import SatSettings, config_for
from cogvideo.checkpoint.sat.conversion import Conversion, TensorMapping
from cogvideo.checkpoint.sat.reader import ITERATION, OWN_CONFIG, RELEASE_BYTES, SAT_CONFIG, SatCheckpoint
from cogvideo.checkpoint.sat.shard import shard, shard_shape
from cogvideo.files import atomic_directory, sha256_file, write_json
from cogvideo.logs import get_logger
from cogvideo.model.config import ModelConfig
from cogvideo.tensor_file import TensorInfo
from cogvideo.torch_archive import check_archive, write_module


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
    by_sat_name = {parameter.sat_name: parameter for parameter in sat.parameters}
    in_file_order = [by_sat_name[name] for name in sat.names]
    infos = {p.name: TensorInfo(dtype or sat.infos[p.name].dtype, sat.infos[p.name].shape) for p in in_file_order}
    mappings = [TensorMapping(sat.names[p.sat_name], p.name, infos[p.name]) for p in in_file_order]
    mappings += [TensorMapping(name, None, None, reason) for name, reason in sat.dropped.items()]

    def run(on_tensor: Callable[[], Any]) -> None:
        hashes = {}
        for path in sat.paths:
            check_archive(path, checksums=True)
            hashes[f"{sat.iteration}/{path.name}"] = sha256_file(path)
        differing = sat.differing_copies()
        if differing:
            get_logger().warning(
                f"{len(differing)} tensors differ between ranks that should hold the same copy; "
                f"rank 0's are kept: {name_list(differing)}"
            )
        by_name = {p.name: p for p in in_file_order}

        def read(name: str) -> Tensor:
            on_tensor()
            return sat.read(by_name[name])

        write_checkpoint(
            Path(out),
            infos,
            read,
            config,
            extra={"sat": {"iteration": sat.iteration, "model_config": sat.model_config, "sha256": hashes}},
            max_shard_bytes=max_shard_bytes,
            other_files={CARD: model_card(conversion, sat, hashes, differing)},
        )

    conversion = Conversion(sat.kind, config, mappings, run, len(infos))
    return conversion


def to_sat(source: Path, out: Path, *, dtype: torch.dtype | None = None, ranks: int = 1) -> Conversion:
    """Plan the conversion of our checkpoint, trunk merged in, to a SAT folder with one file per model-parallel rank.

    A file beside them holds our own settings, since SAT's has no place for some of them; `from_sat` reads it.
    Raises: ValueError, FileNotFoundError, in one line that names what is wrong.
    """
    if ranks < 1:
        raise ValueError(f"cannot split a checkpoint over {ranks} ranks; give a number of at least 1")
    checkpoint = load_checkpoint(Path(source))
    config = stored_config(checkpoint)
    check_fits(checkpoint, config)
    kind = model_kind(config)
    by_name = {parameter.name: parameter for parameter in model_parameters(kind, config.num_layers)}
    ordered = [by_name[name] for name in checkpoint.names]
    infos = {name: TensorInfo(dtype or info.dtype, info.shape) for name, info in checkpoint.infos.items()}
    shard_infos = {
        p.sat_name: TensorInfo(infos[p.name].dtype, shard_shape(infos[p.name].shape, p.split, ranks)) for p in ordered
    }
    mappings = [TensorMapping(p.name, p.sat_name, infos[p.name]) for p in ordered]

    def run(on_tensor: Callable[[], Any]) -> None:
        iteration, sat_config = _stored_origin(checkpoint)
        with atomic_directory(Path(out)) as building:
            (building / iteration).mkdir()
            for rank in range(ranks):
                write_module(
                    building / iteration / f"mp_rank_{rank:02d}_model_states.pt",
                    shard_infos,
                    _shard_reader(checkpoint, {p.sat_name: p for p in ordered}, rank, ranks, on_tensor),
                    {"iteration": int(iteration) if iteration.isdigit() else 0},
                )
            sat_config = (sat_config or _new_sat_config(config)) | {"model_parallel_size": ranks}
            write_json(building / SAT_CONFIG, sat_config)
            write_json(building / OWN_CONFIG, checkpoint.config)
            (building / "latest").write_text(iteration)

    return Conversion(kind, checkpoint.config, mappings, run, len(shard_infos) * ranks)


def _shard_reader(
    checkpoint: Checkpoint, by_sat_name: dict[str, Parameter], rank: int, ranks: int, on_tensor: Callable[[], Any]
) -> Callable[[str], Tensor]:
    """A function that reads one rank's shard by SAT name; it unmaps the files every `RELEASE_BYTES` read."""
    touched = 0

    def read(sat_name: str) -> Tensor:
        nonlocal touched
        if touched > RELEASE_BYTES:
            checkpoint.release()
            touched = 0
        parameter = by_sat_name[sat_name]
        whole = checkpoint.tensor(parameter.name)
        touched += whole.nbytes  # splitting by columns reads every page
        on_tensor()
        return shard(whole, parameter.split, rank, ranks)

    return read


def _stored_origin(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """Iteration and model_config.json of the SAT checkpoint this one was converted from; else `release` and {}."""
    origin = checkpoint.extra.get("sat")
    origin = origin if isinstance(origin, dict) else {}
    iteration, sat_config = origin.get("iteration"), origin.get("model_config")
    if not isinstance(iteration, str) or not ITERATION.fullmatch(iteration):
        iteration = "release"
    return iteration, sat_config if isinstance(sat_config, dict) else {}


def _new_sat_config(config: TransformerConfig) -> dict[str, Any]:
    """A model_config.json with the published keys, for a model that was not converted from a SAT checkpoint."""
    sat_config: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocabulary.size,
        "layernorm_order": "sandwich",
        "max_sequence_length": config.num_positions,
    }
    if isinstance(config, ModelConfig):
        frames = (0, 1, config.layout.num_frames)
        sat_config["layout"] = sorted({config.text_len + count * config.frame_len for count in frames})
        if config.has_temporal_channel:
            sat_config["window_size"] = config.window_size or -1
            sat_config["additional_seqlen"] = config.num_extra_positions
            sat_config["cogvideo_stage"] = 1 if config.task == "sequential" else 2
    return sat_config
