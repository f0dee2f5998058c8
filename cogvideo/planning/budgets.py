"""What a model costs on a machine: memory to train and to sample, time a step and a token. Arithmetic, no model built.

Estimates, to choose a machine by: counts of parameters and of the KV cache are exact, activations and times are not.
Speeds are the vendors' figures for dense bf16 (fp16 where there is none), or `measure`d on the spot.
"""

import os
import time
from dataclasses import dataclass

from cogvideo.model.config import ModelConfig, Recompute, TrunkWeights

TRAINING_EFFICIENCY = 0.4
"""Share of a GPU's stated speed that training of large matrices reaches, about."""
DECODING_EFFICIENCY = 0.7
"""Share of the memory bandwidth that reading weights for one token reaches, about."""
SAFETY = 0.92
"""Share of the memory that can be planned for; the rest is the driver's and the allocator's."""


@dataclass(frozen=True)
class Machine:
    """One device; `count` of them are a caller's matter."""

    name: str
    memory_bytes: float
    flops: float
    """Multiply-adds count two, a second, in bf16."""
    bandwidth: float
    """Memory, bytes a second."""


MACHINES = {
    name: Machine(name, gigabytes * 1e9, tera * 1e12, bandwidth * 1e12)
    for name, gigabytes, tera, bandwidth in (
        ("t4-16", 16, 65, 0.32),
        ("v100-32", 32, 125, 0.90),
        ("a10-24", 24, 125, 0.60),
        ("rtx3090-24", 24, 71, 0.94),
        ("rtx4090-24", 24, 165, 1.01),
        ("l40s-48", 48, 362, 0.86),
        ("a100-40", 40, 312, 1.56),
        ("a100-80", 80, 312, 2.04),
        ("h100-80", 80, 989, 3.35),
        ("h200-141", 141, 989, 4.80),
    )
}


@dataclass(frozen=True)
class TrainingSettings:
    """How a model would be trained."""

    count: int = 1
    """Devices, each with its own share of the batch."""
    micro_batch: int = 4
    """Clips a device at once."""
    zero_stage: int = 2
    """DeepSpeed's: 1 partitions the optimiser, 2 gradients too, 3 also weights."""
    frozen_trunk: bool = True
    """Only what CogVideo adds to the trunk learns; an image model learns whole whatever this says."""
    recompute: Recompute = "layer"
    """In the backward pass, instead of keeping it."""
    trunk_weights: TrunkWeights = "full"
    """`int8`: the frozen trunk's matrices are held so."""

    def __post_init__(self) -> None:
        for name, least, most in (("count", 1, 1 << 20), ("micro_batch", 1, 1 << 20), ("zero_stage", 0, 3)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}; expected {least} to {most}")
        if self.trunk_weights == "int8" and not (self.frozen_trunk and self.zero_stage < 3):
            raise ValueError("trunk_weights=int8 needs frozen_trunk=true and zero_stage=0, 1 or 2")


@dataclass(frozen=True)
class TrainingBudget:
    """Bytes on each of `count` devices, and the time of one step."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    seconds_a_step: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True)
class SamplingBudget:
    """Bytes on one device, and the time of a token decoded one by one."""

    weights: float
    cache: float
    seconds_a_token: float
    tokens: int
    """Drawn one after the other for a clip."""

    @property
    def total(self) -> float:
        return self.weights + self.cache

    @property
    def seconds_a_clip(self) -> float:
        return self.tokens * self.seconds_a_token


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by what they cost: looked up, or multiplied with every row."""

    lookups: int
    """Embedding rows of text, and positions."""
    trunk: int
    temporal: int

    @classmethod
    def of(cls, config: ModelConfig) -> "ParameterCounts":
        h, layers, words = config.hidden_size, config.num_layers, config.vocabulary
        square, linear = 12 * h * h, (3 + 1 + 4 + 1) * h + 8 * h  # biases, then four LayerNorms
        lookups = (words.size - words.num_image_tokens + config.num_positions + config.num_extra_positions) * h
        trunk = layers * (square + linear) + 2 * h + words.num_image_tokens * h
        temporal = layers * (4 * h * h + (3 + 1 + 1) * h) if config.has_temporal_channel else 0
        return cls(lookups, trunk, temporal)

    @property
    def total(self) -> int:
        return self.lookups + self.trunk + self.temporal


def int8_trunk(config: ModelConfig) -> tuple[int, int]:
    """How many of a trunk's parameters are held in int8 if it is, and the bytes that takes, a scale a row included."""
    h, layers, words = config.hidden_size, config.num_layers, config.vocabulary.size
    count, rows = layers * 12 * h * h + words * h, layers * 9 * h + words
    return count, count + 4 * rows


def cache_bytes(config: ModelConfig, batch: int, bytes_each: int = 2) -> int:
    """Keys and values of every layer: of the text and of one frame, and in the temporal channel of the whole clip."""
    rows = config.text_len + config.frame_len
    if config.has_temporal_channel:
        rows += config.text_len + config.layout.num_slots
    return bytes_each * batch * config.num_layers * 2 * rows * config.hidden_size


def score_pairs(config: ModelConfig) -> int:
    """(query, key) pairs of a clip that one layer's attention computes, both channels, text keys included."""
    from cogvideo.model.plan import plan_forward

    plan = plan_forward(config)
    channels = [plan.spatial, *plan.temporal]
    pairs = [
        sum(b.queries.index.numel() * (b.keys.index.shape[1] + config.text_len) for b in c.blocks) for c in channels
    ]
    return pairs[0] + (sum(pairs[1:]) // len(plan.temporal) if plan.temporal else 0)


def training_flops(config: ModelConfig, *, frozen_trunk: bool) -> tuple[float, float]:
    """Forward and backward of one clip with all its text rows: matrix products and attention, nothing recomputed.

    A backward needs each product twice, once for its input and once for its weights; a frozen trunk only the first, and
    neither for text rows, which depend on frozen weights alone.
    """
    h, text, slots, layers = config.hidden_size, config.text_len, config.layout.num_slots, config.num_layers
    frozen_trunk = frozen_trunk and config.has_temporal_channel
    square = 2 * h * h
    trunk_of_text, trunk_of_frames = layers * 12 * square * text, layers * 12 * square * slots
    supervised = len(config.layout.supervised_frames) * config.frame_len
    logits = 2 * h * config.vocabulary.num_image_tokens * supervised
    # of text the temporal channel takes keys and values alone
    temporal = layers * square * (4 * slots + 2 * text) if config.has_temporal_channel else 0
    scores = 4 * h * score_pairs(config) * layers
    forward = trunk_of_text + trunk_of_frames + logits + temporal + scores
    once = trunk_of_frames + logits if frozen_trunk else 0
    twice = temporal if frozen_trunk else forward - scores
    return forward, once + 2 * twice + 2.5 * scores


def training_budget(config: ModelConfig, machine: Machine, settings: TrainingSettings) -> TrainingBudget:
    """bf16 weights and gradients; AdamW with float32 master weights and moments, partitioned as ZeRO's stage says."""
    from cogvideo.model.loss import FROZEN_PART, LOGITS_AT_ONCE

    counts, h = ParameterCounts.of(config), config.hidden_size
    frozen_trunk = settings.frozen_trunk and config.has_temporal_channel
    extra_positions = config.num_extra_positions * h
    trainable = counts.temporal + extra_positions if frozen_trunk else counts.total
    rows = config.text_len + config.layout.num_slots
    supervised = len(config.layout.supervised_frames) * config.frame_len

    # kept of a layer, in values of hidden_size a row: what goes into 4 norms and comes out of 2, query_key_value 3,
    # context 1, MLP 8; the temporal channel adds query_key_value, context and what the mix takes
    dual = config.has_temporal_channel
    # a frozen matrix needs no input for its gradient: not what comes out of the second norm and of GELU
    of_a_layer = {"nothing": (24 if dual else 18) - (5 if frozen_trunk else 0), "mlp": 13 if dual else 8, "layer": 1}
    held = of_a_layer[settings.recompute]
    at_work = of_a_layer["nothing"] - held  # one layer's, while the backward pass computes it anew
    kept = (config.num_layers * held + at_work) * rows * h * 2
    logits_at_once = min(supervised * settings.micro_batch * config.vocabulary.num_image_tokens, LOGITS_AT_ONCE)
    logits = 3 * 4 * logits_at_once / (FROZEN_PART if frozen_trunk else 1)

    forward, backward = training_flops(config, frozen_trunk=frozen_trunk)
    mlps = config.num_layers * 16 * h * h * rows
    again = {"nothing": 0.0, "mlp": mlps, "layer": forward}[settings.recompute]
    flops = settings.micro_batch * (forward + again + backward)

    weights = 2 * counts.total
    if settings.trunk_weights == "int8" and config.has_temporal_channel:
        narrow, narrow_bytes = int8_trunk(config)
        weights += narrow_bytes - 2 * narrow

    def share(from_stage: int) -> int:
        return settings.count if settings.zero_stage >= from_stage else 1

    return TrainingBudget(
        weights=weights / share(3),
        gradients=2 * trainable / share(2),
        optimiser=12 * trainable / share(1),
        activations=settings.micro_batch * kept + logits,
        seconds_a_step=flops / (machine.flops * TRAINING_EFFICIENCY),
    )


def sampling_budget(
    config: ModelConfig, machine: Machine, *, batch: int = 1, guided: bool = True, bytes_each: int = 2
) -> SamplingBudget:
    """A token costs a reading of all weights but the looked-up ones, and of the cache as filled on average."""
    counts = ParameterCounts.of(config)
    rows = batch * (2 if guided and config.has_temporal_channel else 1)
    cache = cache_bytes(config, rows, bytes_each)
    read = bytes_each * (counts.trunk + counts.temporal) + cache / 2
    flops = 2 * rows * (counts.trunk + counts.temporal)
    return SamplingBudget(
        weights=bytes_each * counts.total,
        cache=cache,
        seconds_a_token=max(read / (machine.bandwidth * DECODING_EFFICIENCY), flops / machine.flops),
        tokens=len(config.layout.supervised_frames) * config.frame_len,
    )


def measure() -> Machine:
    """This machine: its GPU if it has one, else its processor. Takes a second or two, and about 0.5 GB."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")

    def seconds(work: object, repeats: int) -> float:
        assert callable(work)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    rows, inner, columns = 512 if cuda else 64, 3072, 12288  # a processor may emulate bf16, slowly
    weights = [torch.zeros(columns, inner, dtype=torch.bfloat16, device=device) for _ in range(4)]
    many = torch.zeros(rows, inner, dtype=torch.bfloat16, device=device)
    one = many[:1]
    flops = 2 * rows * inner * columns / seconds(lambda: many @ weights[0].T, 4)
    # four matrices in turn, 300 MB together: more than a cache holds
    bandwidth = sum(w.nbytes for w in weights) / seconds(lambda: [one @ w.T for w in weights], 4)
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        return Machine(properties.name, properties.total_memory, flops, bandwidth)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(f"this machine's {os.cpu_count()} processors", memory, flops, bandwidth)
