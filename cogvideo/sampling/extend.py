"""Copies of bundles and models with more text pieces, frames per clip or tokens per frame, to be finetuned.

Text pieces: old pieces keep their ids and embeddings, so old prompts give the same tokens. A new piece's embedding
starts as the mean over the pieces that spelled it before.

Longer clips (stage 1): old frames keep their positions, so the first frames of a longer clip are computed as before.
The positions of new frames start as copies of the last old frame's.

Larger frames: the old positions are spread over the larger grid, and those between them are interpolated. With twice
the side, every second row and column holds old positions, unchanged.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo.checkpoint.adapter import FINGERPRINT
from cogvideo.checkpoint.format import Checkpoint, load_checkpoint, save_checkpoint
from cogvideo.checkpoint.load import stored_config
from cogvideo.checkpoint.parameters import TransformerConfig
from cogvideo.config import from_dict, to_dict
from cogvideo.files import atomic_directory, read_json, sha256_file, write_json
from cogvideo.hub import describe
from cogvideo.model.config import ModelConfig
from cogvideo.sampling.assemble import check_replaceable
from cogvideo.sampling.bundle import (
    CLUSTERS,
    HIGH_RES_TOKENIZER,
    MODELS,
    SETTINGS_FILE,
    SUPERRES,
    BundleConfig,
    open_tokenizers,
)
from cogvideo.tokenizers.records import TokenizerRecords
from cogvideo.tokenizers.text import TextTokenizer

EMBEDDINGS = "word_embeddings.weight"
POSITIONS = "position_embeddings.weight"
EXTRA = f"extra_{POSITIONS}"
MAX_TOKENS = 1 << 20
"""Of all frames of a clip together."""

OF_THE_ORIGINAL = ("sat", FINGERPRINT)
"""Keys of `extra` that a changed model must not inherit: the settings of a SAT checkpoint, the weights' fingerprint."""

Change = Callable[[TransformerConfig, dict[str, Tensor]], TransformerConfig]
"""Changes a model's tensors in place, except those stored in its trunk, which are absent; returns its new config."""


def extend_vocabulary(directory: Path, tokenizer: TextTokenizer, out: Path, *, overwrite: bool = False) -> None:
    """Write a copy of a bundle with `tokenizer`, which `TextTokenizer.extended` made from the bundle's own.

    Raises: as `_copy_bundle`.
    """
    old, _, _ = open_tokenizers(directory)

    def change(config: TransformerConfig, tensors: dict[str, Tensor]) -> TransformerConfig:
        if EMBEDDINGS in tensors:
            tensors[EMBEDDINGS] = extend_embeddings(tensors[EMBEDDINGS], old, tokenizer)
        return replace(config, vocabulary=tokenizer.vocabulary)

    names = [name for name in (*MODELS, *SUPERRES.values()) if (directory / name).is_dir()]
    _copy_bundle(directory, out, names, change, tokenizer, overwrite=overwrite)


def extend_clips(
    directory: Path, out: Path, *, num_frames: int | None, frame_side: int | None, overwrite: bool = False
) -> list[str]:
    """Write a copy of a bundle, or of one model, for longer clips, larger frames or both.

    Stage 2 keeps its number of frames, since it runs over any number of key frames. A bundle's super-resolution models
    are left out where frames are larger. Returns the names of what was left out.
    Raises: ValueError for fewer frames or smaller ones, and for more frames of a model other than stage 1; as
    `_copy_bundle`.
    """

    is_bundle = (directory / "sequential").is_dir()

    def change(config: TransformerConfig, tensors: dict[str, Tensor]) -> TransformerConfig:
        if not isinstance(config, ModelConfig):
            if is_bundle:
                return config
            raise ValueError(
                f"{describe(directory)} holds a super-resolution model; give a video or text-to-image model"
            )
        if not is_bundle and num_frames is not None and config.task != "sequential":
            raise ValueError(
                f"{describe(directory)} is a model with task={config.task}; only stage 1 can have more frames"
            )
        return resize(config, tensors, num_frames=num_frames, frame_side=frame_side)

    if not is_bundle:
        _copy_model(load_checkpoint(directory), out, change, None, in_bundle=False)
        return []
    upscalers = [name for name in SUPERRES.values() if (directory / name).is_dir()]
    kept = [*(name for name in MODELS if (directory / name).is_dir()), *([] if frame_side else upscalers)]
    _copy_bundle(directory, out, kept, change, None, overwrite=overwrite)
    return upscalers if frame_side else []


def resize(
    config: ModelConfig, tensors: dict[str, Tensor], *, num_frames: int | None = None, frame_side: int | None = None
) -> ModelConfig:
    """Extend those of a model's position tables that `tensors` has, in place; returns the model's new config.

    `num_frames` is for stage 1 alone. Raises: ValueError for fewer frames or smaller ones, or above MAX_TOKENS.
    """
    old_side = config.frame_side
    side = old_side if frame_side is None else frame_side
    count = config.num_frames if num_frames is None or config.task != "sequential" else num_frames
    if count < config.num_frames or side < old_side:
        raise ValueError(
            f"the model has {config.num_frames} frames of {old_side}x{old_side} tokens, and neither can be reduced; "
            f"got {count} of {side}x{side}"
        )
    if count * side**2 > MAX_TOKENS:
        raise ValueError(
            f"{count} frames of {side}x{side} tokens are more than {MAX_TOKENS:,} in all; give fewer or smaller ones"
        )
    start, end = config.frame_position_start, config.frame_position_start + config.frame_len
    positions = max(config.num_positions, start + side**2)
    if POSITIONS in tensors and side > old_side:
        table = tensors[POSITIONS]
        frame = interpolate_positions(table[start:end], side)
        rest = table[start + len(frame) :]  # rows that nothing reads
        tensors[POSITIONS] = torch.cat([table[:start], frame, rest])
    if EXTRA in tensors:
        frames = list(tensors[EXTRA].split(config.frame_len))  # from frame 1 on; the last part is never read
        if count > config.num_frames:
            last = max(0, config.num_frames - 2)
            frames = frames[: last + 1] + [frames[last]] * (count - last - 1)
        tensors[EXTRA] = torch.cat([interpolate_positions(frame, side) for frame in frames])
    return replace(config, num_frames=count, frame_side=side, num_positions=positions)


def interpolate_positions(table: Tensor, side: int) -> Tensor:
    """Bilinear interpolation of a frame's positions, exact at the old places.

    Shapes: table (old_side**2, h) -> (side**2, h), both in raster order.
    """
    old_side = round(len(table) ** 0.5)
    if side == old_side:
        return table
    places = torch.arange(side, dtype=torch.float64) * old_side / side
    lower = places.long()
    upper, share = (lower + 1).clamp(max=old_side - 1), (places - lower)[:, None, None]
    grid = table.double().view(old_side, old_side, -1)
    for _ in range(2):  # rows, then columns
        grid = (grid[lower] * (1 - share) + grid[upper] * share).transpose(0, 1)
    return grid.reshape(side**2, -1).to(table.dtype)


def extend_embeddings(table: Tensor, old: TextTokenizer, tokenizer: TextTokenizer) -> Tensor:
    """Shapes: table (ids, h) -> (ids of `tokenizer`, h). Rows beyond the old pieces are dropped."""
    new_rows = []
    for id in range(old.vocabulary.size, tokenizer.vocabulary.size):
        spelled = old.encode(tokenizer.piece(id).replace("▁", " "))
        new_rows.append(table[spelled].float().mean(0))
    rows = [table[: old.vocabulary.size], *(row[None].to(table.dtype) for row in new_rows)]
    return torch.cat(rows)


def _copy_bundle(
    directory: Path, out: Path, names: list[str], change: Change, text: TextTokenizer | None, *, overwrite: bool
) -> None:
    """Copy a bundle with its models in `names`, each after `change`, and with `text`, if given, as text tokenizer.

    The folder appears complete or not at all. Raises: FileExistsError; FileNotFoundError, ValueError for a damaged
    bundle; ValueError if `out` contains the bundle.
    """
    if out.resolve() in directory.resolve().parents:
        raise ValueError(f"{out} contains {directory}, which would be removed with it; choose another folder")
    if overwrite:
        check_replaceable(out)
    models = {name: load_checkpoint(directory / name) for name in names}
    with atomic_directory(out, replace=overwrite) as building:
        has_superres = any(name in SUPERRES.values() for name in names)
        tokenizers = {folder: CLUSTERS[folder] for folder in CLUSTERS if has_superres or folder != HIGH_RES_TOKENIZER}
        for name in ("bundle.json", SETTINGS_FILE, "text.model", *tokenizers.values()):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, building / name)
        for name in tokenizers:
            if (directory / name).is_dir():
                shutil.copytree(directory / name, building / name)
        if text is not None:
            text.save(building / "text.model")
        for name, checkpoint in sorted(models.items(), key=lambda item: item[1].trunk is not None):
            _copy_model(checkpoint, building / name, change, text, in_bundle=True)
        config = BundleConfig()
        if (building / "bundle.json").is_file():
            values = read_json(building / "bundle.json", dict[str, Any])
            config = from_dict(BundleConfig, values, str(directory / "bundle.json"))
        hashes = {name: value for name, value in config.sha256.items() if (building / name).is_file()}
        hashes["text.model"] = sha256_file(building / "text.model")
        write_json(building / "bundle.json", to_dict(replace(config, sha256=hashes)))


def _copy_model(
    checkpoint: Checkpoint, out: Path, change: Change, text: TextTokenizer | None, *, in_bundle: bool
) -> None:
    """Copy a model after `change`: without the trunk's tensors if a bundle stores it so, otherwise whole."""
    trunk = checkpoint.trunk if in_bundle else None
    shared = set() if trunk is None else trunk.infos.keys()
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names if name not in shared}
    old = stored_config(checkpoint)
    config = change(old, tensors)
    kind = "model" if "model" in checkpoint.config else "superres"
    settings = {**checkpoint.config, kind: to_dict(config)}
    extra = checkpoint.extra
    if config != old:
        extra = {key: value for key, value in extra.items() if key not in OF_THE_ORIGINAL}
    if text is not None:
        extra = {**extra, **replace(TokenizerRecords.of_export(extra), text=text.sha256).to_extra()}
    beside = None if trunk is None else out.parent / trunk.directory.name
    save_checkpoint(out, tensors, settings, extra=extra, trunk=beside)
