"""A checkpoint, or a model that could be one, as text for people: files, and parameters by part."""

import math
import re
from collections.abc import Iterable

from cogvideo.checkpoint.describe import Description, check_fits, kind_of, sizes_of
from cogvideo.checkpoint.format import MANIFEST, Checkpoint
from cogvideo.checkpoint.sat.names import expand
from cogvideo.dtypes import dtype_name
from cogvideo.files import read_json

PARTS = (
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
"""(title, pattern of the names), in the order shown."""
ADDED = re.compile(r"^extra_position_embeddings|\.temporal_attention\.|\.mix_logit|\.high_res_attention\.")
"""What learns where the trunk is frozen."""


def describe_files(checkpoint: Checkpoint, verified: bool) -> str:
    """Where it lies, how large it is, and what came with it."""
    files = read_json(checkpoint.directory / MANIFEST)["files"]
    size = sum(file["size"] for file in files.values())
    lines = [
        f"{checkpoint.directory}: {len(files)} files, {size:,} bytes, "
        + ("every hash is right" if verified else "hashes not checked")
    ]
    if checkpoint.trunk is not None:
        lines.append(f"  its trunk lies in {checkpoint.trunk.directory}")
    for key, value in checkpoint.extra.items():
        shown = str(value)
        lines.append(f"  {key}: {shown if len(shown) <= 100 else shown[:100] + '...'}")
    return "\n".join(lines)


def describe_tensors(checkpoint: Checkpoint) -> str:
    """One line a tensor: for checkpoints of something else than a transformer."""
    return "\n".join(f"  {name:<60} {info}" for name, info in checkpoint.infos.items())


def describe_parameters(
    config: Description, checkpoint: Checkpoint | None = None, *, frozen_trunk: bool = True, values: bool = False
) -> str:
    """One line a part: its parameters, whether they learn, and how `checkpoint` stores them.

    `values` reads every number, for their spread and to find broken ones. Raises: ValueError if it does not fit.
    """
    kind, sizes = kind_of(config), sizes_of(config)
    if checkpoint is not None:
        check_fits(checkpoint, config)
    frozen_trunk = frozen_trunk and kind in ("video", "direct_superres")
    counts = {p.name: math.prod(sizes.of(p)) for p in expand(kind, config.num_layers)}
    lines, learned, accounted = [], 0, 0
    for title, pattern in PARTS:
        names = [name for name in counts if re.search(pattern, name)]
        if not names:
            continue
        count = sum(counts[name] for name in names)
        learns = not frozen_trunk or ADDED.search(names[0]) is not None
        learned, accounted = learned + count * learns, accounted + count
        stored = "" if checkpoint is None else _stored(checkpoint, names, values)
        lines.append(f"  {title:<26}{count:>15,}  {'trainable' if learns else 'frozen':<11}{stored}".rstrip())
    assert accounted == sum(counts.values()), "a parameter belongs to no part, or to two"
    head = f"parameters: {kind.replace('_', ' ')} model, {config.num_layers} layers of {config.hidden_size}"
    foot = f"  {'all':<26}{accounted:>15,}  {learned:,} trainable, {accounted - learned:,} frozen"
    return "\n".join([head, *lines, foot])


def _stored(checkpoint: Checkpoint, names: Iterable[str], values: bool) -> str:
    names = list(names)
    types = ", ".join(sorted({dtype_name(checkpoint.infos[name].dtype) for name in names}))
    if not values:
        return types
    squares, largest, broken, count = 0.0, 0.0, 0, 0
    for name in names:
        tensor = checkpoint.tensor(name).float()
        finite = tensor[tensor.isfinite()]
        broken += tensor.numel() - finite.numel()
        count += finite.numel()
        if finite.numel():
            squares += float(finite.square().sum(dtype=finite.double().dtype))
            largest = max(largest, float(finite.abs().max()))
    checkpoint.release()
    return f"{types}, rms {math.sqrt(squares / max(count, 1)):.4g}, largest {largest:.4g}" + (
        f", {broken:,} NOT FINITE" if broken else ""
    )
