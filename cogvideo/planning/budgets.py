"""Memory and time that a model needs, computed from its config. No model is built.

Counts of parameters and of the KV cache are exact; activations and times are estimates, good enough to choose a
machine by. `training_flops` and `superres_training_flops` count what the training step computes, for MFU.
"""

from dataclasses import dataclass

from cogvideo.model.config import ModelConfig, Recompute, TrunkWeights
from cogvideo.model.loss import FROZEN_FRACTION, MAX_LOGITS
from cogvideo.model.plan import BlockPlan, plan_forward
from cogvideo.planning.machines import Machine
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import QueryTiles, round_masks
from cogvideo.superres.transformer import visible_keys

TRAINING_EFFICIENCY = 0.4
"""Fraction of a GPU's peak flops that training with large matrices typically reaches."""
DECODING_EFFICIENCY = 0.7
"""Fraction of the memory bandwidth that reading the weights for one token typically reaches."""
USABLE_MEMORY = 0.92
"""Fraction of the memory to plan for; the driver and the allocator need the rest."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a model would be trained."""

    count: int = 1
    """Devices, each with its own share of the batch."""
    micro_batch: int = 4
    """Clips per device in one forward pass."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 1 partitions the optimiser state, 2 also gradients, 3 also weights."""
    frozen_trunk: bool = True
    """Train only what CogVideo adds to the trunk. Image models always train all parameters."""
    recompute: Recompute = "layer"
    """What the backward pass recomputes instead of keeping it from the forward pass."""
    trunk_weights: TrunkWeights = "full"
    """`int8`: keep the frozen trunk's matrices in int8."""

    def __post_init__(self) -> None:
        for name, least, most in (("count", 1, 1 << 20), ("micro_batch", 1, 1 << 20), ("zero_stage", 0, 3)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}; expected {least} to {most}")
        if self.trunk_weights == "int8" and not (self.frozen_trunk and self.zero_stage < 3):
            raise ValueError("trunk_weights=int8 needs frozen_trunk=true and zero_stage=0, 1 or 2")


@dataclass(frozen=True)
class TrainingBudget:
    """Bytes on each device, and the time of one step."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    seconds_per_step: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True)
class SamplingBudget:
    """Bytes on one device, and the time of sequential decoding."""

    weights: float
    cache: float
    seconds_per_token: float
    tokens_per_clip: int

    @property
    def total(self) -> float:
        return self.weights + self.cache

    @property
    def seconds_per_clip(self) -> float:
        return self.tokens_per_clip * self.seconds_per_token


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


def int8_trunk_size(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the trunk that int8 quantization covers, and their bytes, with one float32 scale per row."""
    h, layers, words = config.hidden_size, config.num_layers, config.vocabulary.size
    count, rows = layers * 12 * h * h + words * h, layers * 9 * h + words
    return count, count + 4 * rows


def cache_bytes(config: ModelConfig, batch: int, bytes_per_value: int = 2) -> int:
    """KV cache size. The spatial channel caches text and one frame, the temporal channel text and the whole clip."""
    rows = config.text_len + config.frame_len
    if config.has_temporal_channel:
        rows += config.text_len + config.layout.num_slots
    return bytes_per_value * batch * config.num_layers * 2 * rows * config.hidden_size


def attention_pairs(config: ModelConfig) -> int:
    """(query, key) pairs that attention computes per layer and clip: both channels, text keys included."""
    plan = plan_forward(config)
    channels = [channel for channel in (plan.spatial, *plan.temporal) if isinstance(channel, BlockPlan)]
    pairs = [
        sum(b.queries.index.numel() * (b.keys.index.shape[1] + config.text_len) for b in c.blocks) for c in channels
    ]
    return pairs[0] + (sum(pairs[1:]) // len(plan.temporal) if plan.temporal else 0)


def training_flops(config: ModelConfig, *, frozen_trunk: bool) -> tuple[float, float]:
    """Flops of the forward and of the backward pass of one clip, all text rows included, without recomputation.

    Counts matrix products and attention. The backward pass needs each product twice, for the gradients of its input
    and of its weights. A frozen trunk needs only the first, and neither on text rows, which then depend on frozen
    weights alone.
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
    once = trunk_on_frames + logits if frozen_trunk else 0
    twice = temporal if frozen_trunk else forward - scores
    return forward, once + 2 * twice + 2.5 * scores


def superres_training_flops(config: SuperresConfig, *, frozen_trunk: bool) -> float:
    """Flops of the forward and backward pass of one frame, counted as by `training_flops`.

    With a frozen trunk the context (text and coarse grid) needs no backward pass. Logits: the number of tokens that
    a round predicts on average.
    """
    h, layers, context = config.hidden_size, config.num_layers, config.text_len + config.low_res_len
    square = 2 * h * h
    attention, mlp = layers * 4 * square * config.high_res_len, layers * 8 * square * config.high_res_len
    on_context = layers * 12 * square * context + layers * 4 * h * context**2
    visible = visible_keys(config)
    scores = layers * 4 * h * (_tile_pairs(visible.context) + _tile_pairs(visible.grid))
    logits = 2 * h * config.vocabulary.num_image_tokens * float(round_masks(config).sum(1).float().mean())
    forward = attention + mlp + on_context + scores + logits
    if frozen_trunk:
        return forward + 2 * attention + mlp + logits + 2.5 * scores
    return forward + 2 * (attention + mlp + on_context + logits) + 2.5 * scores


def _tile_pairs(tiles: QueryTiles) -> int:
    return tiles.queries.numel() * tiles.keys.shape[1]


def training_budget(config: ModelConfig, machine: Machine, settings: TrainingSettings) -> TrainingBudget:
    """Estimate memory per device and time per step.

    Weights and gradients are bf16; AdamW keeps float32 master weights and moments, partitioned by the ZeRO stage.
    """
    counts, h = count_parameters(config), config.hidden_size
    frozen_trunk = settings.frozen_trunk and config.has_temporal_channel
    extra_positions = config.num_extra_positions * h
    trainable = counts.temporal + extra_positions if frozen_trunk else counts.total
    rows = config.text_len + config.layout.num_slots
    supervised = len(config.layout.supervised_frames) * config.frame_len

    # Activations kept per layer and row, in units of hidden_size: the inputs of 4 LayerNorms and the outputs of 2, then
    # query_key_value 3, context 1, MLP 8. The temporal channel adds query_key_value, context and the inputs of the mix.
    # A frozen matrix needs no input for its weight gradient, so the output of the second LayerNorm and of GELU go.
    dual = config.has_temporal_channel
    per_layer = {"nothing": (24 if dual else 18) - (5 if frozen_trunk else 0), "mlp": 13 if dual else 8, "layer": 1}
    kept = per_layer[settings.recompute]
    recomputed = per_layer["nothing"] - kept  # alive for one layer at a time, during its backward pass
    activations = (config.num_layers * kept + recomputed) * rows * h * 2
    logits_at_once = min(supervised * settings.micro_batch * config.vocabulary.num_image_tokens, MAX_LOGITS)
    logits = 3 * 4 * logits_at_once / (FROZEN_FRACTION if frozen_trunk else 1)

    forward, backward = training_flops(config, frozen_trunk=frozen_trunk)
    mlps = config.num_layers * 16 * h * h * rows
    again = {"nothing": 0.0, "mlp": mlps, "layer": forward}[settings.recompute]
    flops = settings.micro_batch * (forward + again + backward)

    weights = 2 * counts.total
    if settings.trunk_weights == "int8" and config.has_temporal_channel:
        quantized, quantized_bytes = int8_trunk_size(config)
        weights += quantized_bytes - 2 * quantized

    def partitions(from_stage: int) -> int:
        return settings.count if settings.zero_stage >= from_stage else 1

    return TrainingBudget(
        weights=weights / partitions(3),
        gradients=2 * trainable / partitions(2),
        optimiser=12 * trainable / partitions(1),
        activations=settings.micro_batch * activations + logits,
        seconds_per_step=flops / (machine.flops * TRAINING_EFFICIENCY),
    )


def sampling_budget(
    config: ModelConfig, machine: Machine, *, batch: int = 1, guided: bool = True, bytes_per_value: int = 2
) -> SamplingBudget:
    """Estimate memory and time to sample. Each token reads all weights but the embeddings, and half the cache."""
    counts = count_parameters(config)
    rows = batch * (2 if guided and config.has_temporal_channel else 1)
    cache = cache_bytes(config, rows, bytes_per_value)
    read = bytes_per_value * (counts.trunk + counts.temporal) + cache / 2  # the cache is half full on average
    flops = 2 * rows * (counts.trunk + counts.temporal)
    return SamplingBudget(
        weights=bytes_per_value * counts.total,
        cache=cache,
        seconds_per_token=max(read / (machine.bandwidth * DECODING_EFFICIENCY), flops / machine.flops),
        tokens_per_clip=len(config.layout.supervised_frames) * config.frame_len,
    )
