"""Tensor names of published (SAT) checkpoints: old spellings, and which model a set of names belongs to.

The mapping to our parameters is in `cogvideo.checkpoint.parameters`.
"""

import re
from collections.abc import Iterable

from cogvideo.checkpoint.parameters import EXTRA_POSITIONS, SAT_MIXIN, ModelKind

OLD_SAT_NAMES: tuple[tuple[str, str | None], ...] = (
    # the embedding was outside the transformer
    (r"word_embeddings\.weight", "transformer.word_embeddings.weight"),
    # mixins had numbers
    (r"mixins\.\d+\.(position_embeddings\.weight)", r"mixins.extra_position_embedding.\1"),
    (
        r"mixins\.\d+\.((query_key_value|dense)\.\d+\.(weight|bias)|attn_distribution\.\d+)",
        r"mixins.attention_plus.\1",
    ),
)
"""(pattern of an old name, the current name or None to drop the tensor). No known tensor has to be dropped."""


def canonical_sat_name(name: str) -> str | None:
    """The current SAT name of a tensor, whichever version wrote the file; None if the tensor is dropped."""
    for pattern, replacement in OLD_SAT_NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return None if replacement is None else match.expand(replacement)
    return name


def kind_from_names(names: Iterable[str]) -> ModelKind:
    """The kind of model that has tensors of these (canonical) names.

    CogVideo's two stages have the same names and shapes: the tensors cannot tell them apart.
    """
    names = set(names)
    if any(name.startswith(f"{SAT_MIXIN}.attn_distribution.") for name in names):
        return "video"
    if any(name.startswith(f"{SAT_MIXIN}.") for name in names):
        return "direct_superres"
    return "iterative_superres" if EXTRA_POSITIONS.sat_name in names else "image"
