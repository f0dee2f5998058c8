"""What a config determines exactly: numbers of parameters, cache size, and the flops of a training step."""

from dataclasses import dataclass
from functools import lru_cache

from cogvideo.checkpoint.parameters import TransformerConfig
from cogvideo.model.config import ModelConfig
from cogvideo.model.plan import BlockPlan, plan_forward
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import QueryTiles, round_masks
from cogvideo.superres.transformer import visible_keys


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters grouped by what they cost: looked up by index, or multiplied with every row."""

    lookups: int
    """Text and position embeddings."""
    trunk: int
    temporal: int

    @property
    def total(self) -> int:
        return self.lookups + self.trunk + self.temporal


def count_parameters(config: ModelConfig) -> ParameterCounts:
    h, layers, vocabulary = config.hidden_size, config.num_layers, config.vocabulary
    matrices, vectors = 12 * h * h, (3 + 1 + 4 + 1) * h + 8 * h  # per layer; biases, then four LayerNorms
    text_embeddings = vocabulary.size - vocabulary.num_image_tokens
    lookups = (text_embeddings + config.num_positions + config.num_extra_positions) * h
    trunk = layers * (matrices + vectors) + 2 * h + vocabulary.num_image_tokens * h
    temporal = layers * (4 * h * h + (3 + 1 + 1) * h) if config.has_temporal_channel else 0
    return ParameterCounts(lookups, trunk, temporal)


def quantized_trunk_size(config: TransformerConfig) -> tuple[int, int]:
    """Parameters of the trunk that are held in int8 or float8, and their bytes, with one float32 scale per row."""
    h, layers, words = config.hidden_size, config.num_layers, config.vocabulary.size
    count, rows = layers * 12 * h * h + words * h, layers * 9 * h + words
    return count, count + 4 * rows


def cache_bytes(config: ModelConfig, batch: int, bytes_per_value: int = 2) -> int:
    """KV cache size. The spatial channel caches text and one frame, the temporal channel text and the whole clip."""
    rows = config.text_len + config.frame_len
    if config.has_temporal_channel:
        rows += config.text_len + config.layout.num_slots
    return bytes_per_value * batch * config.num_layers * 2 * rows * config.hidden_size


@lru_cache(maxsize=64)
def attention_pairs(config: ModelConfig) -> int:
    """(query, key) pairs that attention computes per layer and clip: both channels, text keys included."""
    plan = plan_forward(config)
    channels = [channel for channel in (plan.spatial, *plan.temporal) if isinstance(channel, BlockPlan)]
    pairs = [
        sum(b.queries.index.numel() * (b.keys.index.shape[1] + config.text_len) for b in c.blocks) for c in channels
    ]
    return pairs[0] + (sum(pairs[1:]) // len(plan.temporal) if plan.temporal else 0)


def training_flops(config: ModelConfig, *, frozen_trunk: bool, lora: bool = False) -> tuple[float, float]:
    """Flops of the forward and of the backward pass of one clip, all text rows included, without recomputation.

    Counts matrix products and attention. The backward pass needs each product twice, for the gradients of its input
    and of its weights. A frozen trunk needs only the first, and neither on text rows, which then depend on frozen
    weights alone. With adapters (`lora`) every product needs only the first; the adapters' own are not counted.
    """
    h, text, slots, layers = config.hidden_size, config.text_len, config.layout.num_slots, config.num_layers
    frozen_trunk = frozen_trunk and config.has_temporal_channel
    square = 2 * h * h
    trunk_on_text, trunk_on_frames = layers * 12 * square * text, layers * 12 * square * slots
    supervised = len(config.layout.supervised_frames) * config.frame_len
    logits = 2 * h * config.vocabulary.num_image_tokens * supervised
    # Text rows have only keys and values in the temporal channel.
    temporal = layers * square * (4 * slots + 2 * text) if config.has_temporal_channel else 0
    scores = 4 * h * attention_pairs(config) * layers
    forward = trunk_on_text + trunk_on_frames + logits + temporal + scores
    if lora:
        return forward, forward - scores + 2.5 * scores
    once = trunk_on_frames + logits if frozen_trunk else 0
    twice = temporal if frozen_trunk else forward - scores
    return forward, once + 2 * twice + 2.5 * scores


def superres_training_flops(config: SuperresConfig, *, frozen_trunk: bool, lora: bool = False) -> tuple[float, float]:
    """Flops of the forward and of the backward pass of one frame, counted as by `training_flops`.

    With a frozen trunk the context (text and coarse grid) needs no backward pass. Logits are counted for the number
    of tokens that a round predicts on average.
    """
    h, layers, context = config.hidden_size, config.num_layers, config.text_len + config.low_res_len
    square = 2 * h * h
    attention, mlp = layers * 4 * square * config.high_res_len, layers * 8 * square * config.high_res_len
    on_context = layers * 12 * square * context + layers * 4 * h * context**2
    scores = layers * 4 * h * superres_pairs(config)
    logits = 2 * h * config.vocabulary.num_image_tokens * float(round_masks(config).sum(1).float().mean())
    forward = attention + mlp + on_context + scores + logits
    if lora:
        return forward, forward - scores + 2.5 * scores
    if frozen_trunk:
        return forward, 2 * attention + mlp + logits + 2.5 * scores
    return forward, 2 * (attention + mlp + on_context + logits) + 2.5 * scores


@lru_cache(maxsize=64)
def superres_pairs(config: SuperresConfig) -> int:
    """(query, key) pairs of the fine grid's attention, per layer and frame."""
    visible = visible_keys(config)
    return _tile_pairs(visible.context) + _tile_pairs(visible.grid)


def _tile_pairs(tiles: QueryTiles) -> int:
    return tiles.queries.numel() * tiles.keys.shape[1]


def num_rows(config: TransformerConfig) -> int:
    """Rows of text and frames that a layer computes for one clip, or one frame of super-resolution."""
    if isinstance(config, SuperresConfig):
        return config.text_len + config.low_res_len + config.high_res_len
    return config.text_len + config.layout.num_slots
