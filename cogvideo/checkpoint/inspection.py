"""A readable description of a checkpoint: its files, and its parameters by group. `cogvideo inspect` prints it.

Not here: masks, memory and time (`cogvideo.planning.report`).
"""

import math
import re
from collections.abc import Iterable

import torch

from cogvideo.checkpoint.format import MANIFEST, Checkpoint, Manifest
from cogvideo.checkpoint.load import check_fits
from cogvideo.checkpoint.parameters import TransformerConfig, model_kind, parameter_shapes
from cogvideo.dtypes import dtype_name
from cogvideo.files import read_json
from cogvideo.hub import describe
from cogvideo.model.config import LoraConfig
from cogvideo.model.lora import count_adapters

GROUPS = (
    ("embeddings", r"^word_embeddings"),
    ("positions", r"^position_embeddings"),
    ("extra positions", r"^extra_position_embeddings"),
    ("attention", r"\.attention\."),
    ("temporal attention", r"\.temporal_attention\."),
    ("mixing of the channels", r"\.mix_logit"),
    ("high-resolution attention", r"\.high_res_attention\."),
    ("MLP", r"\.mlp\."),
    ("LayerNorms", r"layernorm"),
)
"""(title, pattern of parameter names), in the order shown."""
NOT_IN_TRUNK = re.compile(r"^extra_position_embeddings|\.temporal_attention\.|\.mix_logit|\.high_res_attention\.")
"""Parameters that are trained when the trunk is frozen."""


def describe_files(checkpoint: Checkpoint, verified: bool) -> str:
    """The folder, its size, its trunk and the `extra` fields stored with it."""
    files = read_json(checkpoint.directory / MANIFEST, Manifest)["files"]
    size = sum(file["size"] for file in files.values())
    lines = [
        f"{describe(checkpoint.directory)}: {len(files)} files, {size:,} bytes, "
        + ("all hashes match" if verified else "hashes not checked")
    ]
    if checkpoint.trunk is not None:
        lines.append(f"  trunk: {describe(checkpoint.trunk.directory)}")
    for key, value in checkpoint.extra.items():
        text = str(value)
        lines.append(f"  {key}: {text if len(text) <= 100 else text[:100] + '...'}")
    return "\n".join(lines)


def describe_tensors(checkpoint: Checkpoint) -> str:
    """One line per tensor, for checkpoints that do not hold a transformer."""
    return "\n".join(f"  {name:<60} {info}" for name, info in checkpoint.infos.items())


def describe_parameters(
    config: TransformerConfig,
    checkpoint: Checkpoint | None = None,
    *,
    frozen_trunk: bool = True,
    values: bool = False,
    adapters: LoraConfig | None = None,
) -> str:
    """One line per group of parameters: their number, whether they are trained, and their type in `checkpoint`.

    `values`: read every value, to report the spread and to find NaN and infinity. `adapters`: trained instead of the
    model, if their rank is above 0. Raises: ValueError if the checkpoint does not fit the config.
    """
    kind = model_kind(config)
    if checkpoint is not None:
        check_fits(checkpoint, config)
    frozen_trunk = frozen_trunk and kind in ("video", "direct_superres")
    shapes = parameter_shapes(config)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    of_adapters = count_adapters(shapes, adapters) if adapters else 0
    lines, total, trainable = [], 0, 0
    for title, pattern in GROUPS:
        names = [name for name in counts if re.search(pattern, name)]
        if not names:
            continue
        count = sum(counts[name] for name in names)
        is_trained = not of_adapters and (not frozen_trunk or NOT_IN_TRUNK.search(names[0]) is not None)
        total, trainable = total + count, trainable + count * is_trained
        stored = "" if checkpoint is None else _describe_stored(checkpoint, names, values)
        lines.append(f"  {title:<26}{count:>15,}  {'trainable' if is_trained else 'frozen':<11}{stored}".rstrip())
    assert total == sum(counts.values()), "a parameter is in no group, or in two"
    if of_adapters:
        total, trainable = total + of_adapters, of_adapters
        lines.append(f"  {'adapters':<26}{of_adapters:>15,}  trainable")
    title = f"parameters: {kind.replace('_', ' ')} model, {config.num_layers} layers of {config.hidden_size}"
    totals = f"  {'all':<26}{total:>15,}  {trainable:,} trainable, {total - trainable:,} frozen"
    return "\n".join([title, *lines, totals])


def _describe_stored(checkpoint: Checkpoint, names: Iterable[str], values: bool) -> str:
    names = list(names)
    types = ", ".join(sorted({dtype_name(checkpoint.infos[name].dtype) for name in names}))
    if not values:
        return types
    sum_of_squares, largest, num_finite, num_broken = 0.0, 0.0, 0, 0
    for name in names:
        tensor = checkpoint.tensor(name).float()
        finite = tensor[tensor.isfinite()]
        num_finite += finite.numel()
        num_broken += tensor.numel() - finite.numel()
        if finite.numel():
            sum_of_squares += float(finite.square().sum(dtype=torch.float64))
            largest = max(largest, float(finite.abs().max()))
    checkpoint.release()
    return f"{types}, rms {math.sqrt(sum_of_squares / max(num_finite, 1)):.4g}, largest {largest:.4g}" + (
        f", {num_broken:,} NOT FINITE" if num_broken else ""
    )
