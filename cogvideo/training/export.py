"""What a run exports: the model in our own format; a frozen trunk once, beside it."""

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
    """A trunk that a run leaves as it is."""

    source: Path
    """The checkpoint that it is from."""
    config: ModelConfig
    """Of the trunk alone."""


def export_model(
    place: Path,
    model: CogVideoTransformer | SuperresTransformer,
    extra: dict[str, Any],
    frozen: FrozenTrunk | None,
) -> None:
    """Write `place`; every process must call this. A frozen trunk goes to trunk/ beside it, to which it then points."""
    with gathered(model.parameters()):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        beside = place.parent / "trunk"
        for left in (place, beside):
            remove_leftovers(left)  # of a run that was killed here
        if frozen is not None:
            _export_trunk(beside, model, frozen)
        save_model(place, model, extra=extra, trunk=None if frozen is None else beside)


def _export_trunk(place: Path, model: CogVideoTransformer | SuperresTransformer, frozen: FrozenTrunk) -> None:
    if _is_whole(place):
        return
    shutil.rmtree(place, ignore_errors=True)
    stored = load_checkpoint(frozen.source, verify=False)
    if stored.config.get("model", {}).get("task") == "image":
        with atomic_directory(place, replace=True) as building:
            # the same bytes: stages of one trunk can share it
            shutil.copytree(frozen.source, building, dirs_exist_ok=True)
        return
    # as it is stored, in whichever type the run holds it
    infos = {name: stored.infos[name] for name, _ in model.trunk_parameters()}
    write_checkpoint(place, infos, stored.tensor, {"model": to_dict(frozen.config)})


def _is_whole(place: Path) -> bool:
    """Whether a checkpoint is there, with all its files."""
    try:
        load_checkpoint(place, verify=False)
    except (OSError, ValueError):
        return False
    return True
