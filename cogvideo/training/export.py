"""Exports of a run: the model in our checkpoint format, and a frozen trunk once, beside it."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cogvideo.checkpoint.format import load_checkpoint, write_checkpoint
from cogvideo.checkpoint.load import save_model
from cogvideo.config import to_dict
from cogvideo.files import atomic_directory, remove_leftovers
from cogvideo.model.config import ModelConfig
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.training.deepspeed_engine import gathered


class FrozenTrunk(NamedTuple):
    """A trunk that a run does not train."""

    source: Path
    """The checkpoint that it was loaded from."""
    config: ModelConfig
    """The config of the trunk alone."""


def export_model(
    folder: Path,
    model: CogVideoTransformer | SuperresTransformer,
    extra: dict[str, Any],
    frozen: FrozenTrunk | None,
) -> None:
    """Write `folder`; every rank must call this. A frozen trunk goes to trunk/ beside it, and `folder` refers to it."""
    with gathered(model.parameters()):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        trunk = folder.parent / "trunk"
        for path in (folder, trunk):
            remove_leftovers(path)  # of a run that was killed while exporting
        if frozen is not None:
            _export_trunk(trunk, model, frozen)
        save_model(folder, model, extra=extra, trunk=None if frozen is None else trunk)


def _export_trunk(folder: Path, model: CogVideoTransformer | SuperresTransformer, frozen: FrozenTrunk) -> None:
    if _is_complete(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    stored = load_checkpoint(frozen.source, verify=False)
    if stored.config.get("model", {}).get("task") == "image":
        with atomic_directory(folder, replace=True) as temporary:
            # an exact copy, so that the stages of one trunk can share it
            shutil.copytree(frozen.source, temporary, dirs_exist_ok=True)
        return
    # the source's tensors, not those in memory, which may be quantized
    infos = {name: stored.infos[name] for name, _ in model.trunk_parameters()}
    write_checkpoint(folder, infos, stored.tensor, {"model": to_dict(frozen.config)})


def _is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint with all its files."""
    try:
        load_checkpoint(folder, verify=False)
    except (OSError, ValueError):
        return False
    return True
