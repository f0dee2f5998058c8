"""Every parameter of every model, as data: our name, the published (SAT) name, its shape, how ranks share it.

The table below is all that conversion knows of the models; it needs no model to be built. Nothing is matched loosely:
`expand` writes out each name of a model of given sizes, and what is not among them is for the caller to refuse.

Super-resolution: the direct model's second projection (published: `attention_plus`, without a mixing logit) serves the
high-resolution rows only, so it is our `high_res_attention`. The extra position table has the same role in all models
(positions beyond the trunk's table) and the same name; its rows are clip slots in video, 60x60 places in the others.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Kind = Literal["image", "video", "direct_superres", "iterative_superres"]


class Split(Enum):
    """How one tensor lies on model-parallel ranks. Source: SwissArmyTransformer's parallel layers."""

    REPLICATED = "the same on every rank"
    ROWS = "consecutive blocks of rows"
    COLUMNS = "consecutive blocks of columns"
    QKV = "rows: each rank has its block of Q, of K and of V"


@dataclass(frozen=True)
class Parameter:
    """One line of the table; `{i}` stands for the layer."""

    name: str
    sat: str
    shape: tuple[str, ...]
    """In terms of `Sizes.named`."""
    split: Split = Split.REPLICATED

    def at(self, layer: int) -> "Parameter":
        return Parameter(self.name.format(i=layer), self.sat.format(i=layer), self.shape, self.split)

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.name


@dataclass(frozen=True)
class Sizes:
    """What the shapes depend on."""

    num_layers: int
    hidden_size: int
    vocabulary: int
    num_positions: int
    num_extra_positions: int = 0

    def of(self, parameter: Parameter) -> tuple[int, ...]:
        named = {
            "h": self.hidden_size,
            "3h": 3 * self.hidden_size,
            "4h": 4 * self.hidden_size,
            "vocabulary": self.vocabulary,
            "positions": self.num_positions,
            "extra positions": self.num_extra_positions,
        }
        return tuple(named[symbol] for symbol in parameter.shape)


def _layernorm(name: str, sat: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(f"{name}.{part}", f"{sat}.{part}", ("h",)) for part in ("weight", "bias"))


def _qkv(name: str, sat: str) -> tuple[Parameter, ...]:
    return (
        Parameter(f"{name}.weight", f"{sat}.weight", ("3h", "h"), Split.QKV),
        Parameter(f"{name}.bias", f"{sat}.bias", ("3h",), Split.QKV),
    )


def _dense(name: str, sat: str) -> tuple[Parameter, ...]:
    return (
        Parameter(f"{name}.weight", f"{sat}.weight", ("h", "h"), Split.COLUMNS),
        Parameter(f"{name}.bias", f"{sat}.bias", ("h",)),
    )


LAYER, SAT_LAYER, PLUS = "layers.{i}", "transformer.layers.{i}", "mixins.attention_plus"

TRUNK = (
    Parameter("word_embeddings.weight", "transformer.word_embeddings.weight", ("vocabulary", "h"), Split.ROWS),
    Parameter("position_embeddings.weight", "transformer.position_embeddings.weight", ("positions", "h")),
    *_layernorm(f"{LAYER}.input_layernorm", f"{SAT_LAYER}.input_layernorm"),
    *_qkv(f"{LAYER}.attention.query_key_value", f"{SAT_LAYER}.attention.query_key_value"),
    *_dense(f"{LAYER}.attention.dense", f"{SAT_LAYER}.attention.dense"),
    *_layernorm(f"{LAYER}.third_layernorm", f"{SAT_LAYER}.third_layernorm"),
    *_layernorm(f"{LAYER}.post_attention_layernorm", f"{SAT_LAYER}.post_attention_layernorm"),
    Parameter(f"{LAYER}.mlp.dense_h_to_4h.weight", f"{SAT_LAYER}.mlp.dense_h_to_4h.weight", ("4h", "h"), Split.ROWS),
    Parameter(f"{LAYER}.mlp.dense_h_to_4h.bias", f"{SAT_LAYER}.mlp.dense_h_to_4h.bias", ("4h",), Split.ROWS),
    Parameter(f"{LAYER}.mlp.dense_4h_to_h.weight", f"{SAT_LAYER}.mlp.dense_4h_to_h.weight", ("h", "4h"), Split.COLUMNS),
    Parameter(f"{LAYER}.mlp.dense_4h_to_h.bias", f"{SAT_LAYER}.mlp.dense_4h_to_h.bias", ("h",)),
    *_layernorm(f"{LAYER}.fourth_layernorm", f"{SAT_LAYER}.fourth_layernorm"),
    *_layernorm("final_layernorm", "transformer.final_layernorm"),
)
EXTRA_POSITIONS = Parameter(
    "extra_position_embeddings.weight",
    "mixins.extra_position_embedding.position_embeddings.weight",
    ("extra positions", "h"),
)
TEMPORAL = (
    *_qkv(f"{LAYER}.temporal_attention.query_key_value", f"{PLUS}.query_key_value.{{i}}"),
    *_dense(f"{LAYER}.temporal_attention.dense", f"{PLUS}.dense.{{i}}"),
    Parameter(f"{LAYER}.mix_logit", f"{PLUS}.attn_distribution.{{i}}", ("h",)),
)
HIGH_RES = (
    *_qkv(f"{LAYER}.high_res_attention.query_key_value", f"{PLUS}.query_key_value.{{i}}"),
    *_dense(f"{LAYER}.high_res_attention.dense", f"{PLUS}.dense.{{i}}"),
)
PARAMETERS: dict[Kind, tuple[Parameter, ...]] = {
    "image": TRUNK,
    "video": (*TRUNK, EXTRA_POSITIONS, *TEMPORAL),
    "direct_superres": (*TRUNK, EXTRA_POSITIONS, *HIGH_RES),
    "iterative_superres": (*TRUNK, EXTRA_POSITIONS),
}

OLD_SAT_NAMES: tuple[tuple[str, str | None, str], ...] = (
    (r"word_embeddings\.weight", "transformer.word_embeddings.weight", "the embedding stood outside the transformer"),
    (r"mixins\.\d+\.(position_embeddings\.weight)", r"mixins.extra_position_embedding.\1", "mixins had numbers"),
    (
        r"mixins\.\d+\.((query_key_value|dense)\.\d+\.(weight|bias)|attn_distribution\.\d+)",
        r"mixins.attention_plus.\1",
        "mixins had numbers",
    ),
)
"""(pattern of an old name, today's name or None to drop the tensor, why). Nothing known needs to be dropped."""


def today(sat_name: str) -> str | None:
    """The present SAT name of a tensor that an old file names otherwise; None if it is dropped."""
    for pattern, replacement, _ in OLD_SAT_NAMES:
        match = re.fullmatch(pattern, sat_name)
        if match:
            return None if replacement is None else match.expand(replacement)
    return sat_name


def expand(kind: Kind, num_layers: int) -> list[Parameter]:
    """The table written out for a model of so many layers."""
    once = [p for p in PARAMETERS[kind] if not p.per_layer]
    each = [p for p in PARAMETERS[kind] if p.per_layer]
    return once + [p.at(i) for i in range(num_layers) for p in each]


def listed(names: list[str] | set[str], most: int = 4) -> str:
    """A few of the names, for an error line."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(name[:100] for name in ordered[:most]) + more
