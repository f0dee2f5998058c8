"""Every parameter of every transformer, as data: our name, its name in published checkpoints (SAT), shape, rank split.

Checking and converting a checkpoint need only this table; no model has to be built. Names are never matched loosely:
`model_parameters` writes out every name of a model of a given size, and callers refuse what is not among them.

Super-resolution: the direct model's second projection (published as `attention_plus`, without a mixing logit) serves
only the high-resolution rows, so it is our `high_res_attention`. The extra position table has one role (positions
beyond the trunk's table) and one name in all models; its rows are clip slots in video, places of the 60x60 grid in
super-resolution.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from cogvideo.model.config import ModelConfig
from cogvideo.superres.config import SuperresConfig

TransformerConfig = ModelConfig | SuperresConfig
ModelKind = Literal["image", "video", "direct_superres", "iterative_superres"]


class Split(Enum):
    """How a tensor is split over model-parallel ranks. Source: SwissArmyTransformer's parallel layers."""

    REPLICATED = "the same on every rank"
    ROWS = "consecutive blocks of rows"
    COLUMNS = "consecutive blocks of columns"
    QKV = "rows: each rank has its block of Q, of K and of V"


@dataclass(frozen=True)
class Parameter:
    """One row of the table; `{i}` in a name stands for the layer."""

    name: str
    sat_name: str
    shape: tuple[str, ...]
    """Symbols that `Sizes.shape_of` looks up."""
    split: Split = Split.REPLICATED

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.name

    def in_layer(self, layer: int) -> "Parameter":
        return Parameter(self.name.format(i=layer), self.sat_name.format(i=layer), self.shape, self.split)


@dataclass(frozen=True)
class Sizes:
    """The numbers that shapes depend on."""

    num_layers: int
    hidden_size: int
    vocabulary: int
    num_positions: int
    num_extra_positions: int = 0

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        sizes = {
            "h": self.hidden_size,
            "3h": 3 * self.hidden_size,
            "4h": 4 * self.hidden_size,
            "vocabulary": self.vocabulary,
            "positions": self.num_positions,
            "extra positions": self.num_extra_positions,
        }
        return tuple(sizes[symbol] for symbol in parameter.shape)


def _layernorm(name: str, sat_name: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(f"{name}.{field}", f"{sat_name}.{field}", ("h",)) for field in ("weight", "bias"))


def _qkv(name: str, sat_name: str) -> tuple[Parameter, ...]:
    return (
        Parameter(f"{name}.weight", f"{sat_name}.weight", ("3h", "h"), Split.QKV),
        Parameter(f"{name}.bias", f"{sat_name}.bias", ("3h",), Split.QKV),
    )


def _dense(name: str, sat_name: str) -> tuple[Parameter, ...]:
    return (
        Parameter(f"{name}.weight", f"{sat_name}.weight", ("h", "h"), Split.COLUMNS),
        Parameter(f"{name}.bias", f"{sat_name}.bias", ("h",)),
    )


LAYER, SAT_LAYER, SAT_MIXIN = "layers.{i}", "transformer.layers.{i}", "mixins.attention_plus"

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
    *_qkv(f"{LAYER}.temporal_attention.query_key_value", f"{SAT_MIXIN}.query_key_value.{{i}}"),
    *_dense(f"{LAYER}.temporal_attention.dense", f"{SAT_MIXIN}.dense.{{i}}"),
    Parameter(f"{LAYER}.mix_logit", f"{SAT_MIXIN}.attn_distribution.{{i}}", ("h",)),
)
HIGH_RES = (
    *_qkv(f"{LAYER}.high_res_attention.query_key_value", f"{SAT_MIXIN}.query_key_value.{{i}}"),
    *_dense(f"{LAYER}.high_res_attention.dense", f"{SAT_MIXIN}.dense.{{i}}"),
)
PARAMETERS: dict[ModelKind, tuple[Parameter, ...]] = {
    "image": TRUNK,
    "video": (*TRUNK, EXTRA_POSITIONS, *TEMPORAL),
    "direct_superres": (*TRUNK, EXTRA_POSITIONS, *HIGH_RES),
    "iterative_superres": (*TRUNK, EXTRA_POSITIONS),
}


def model_parameters(kind: ModelKind, num_layers: int) -> list[Parameter]:
    """Every parameter of a model with this many layers: the rows of the table, per-layer ones once per layer."""
    once = [p for p in PARAMETERS[kind] if not p.per_layer]
    per_layer = [p for p in PARAMETERS[kind] if p.per_layer]
    return once + [p.in_layer(i) for i in range(num_layers) for p in per_layer]


def model_kind(config: TransformerConfig) -> ModelKind:
    """Which entry of `PARAMETERS` a config describes."""
    if isinstance(config, SuperresConfig):
        return "direct_superres" if config.method == "direct" else "iterative_superres"
    return "video" if config.has_temporal_channel else "image"


def model_sizes(config: TransformerConfig) -> Sizes:
    extra = config.high_res_side**2 if isinstance(config, SuperresConfig) else config.num_extra_positions
    return Sizes(config.num_layers, config.hidden_size, config.vocabulary.size, config.num_positions, extra)


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model with this config."""
    sizes = model_sizes(config)
    return {p.name: sizes.shape_of(p) for p in model_parameters(model_kind(config), config.num_layers)}


def name_list(names: Iterable[str], most: int = 4) -> str:
    """The first few names, sorted, for an error line: `a, b, c, d and 12 more`."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(name[:100] for name in ordered[:most]) + more
