"""Memory and time that a model needs, computed from its config.

Parameter counts and the KV cache size are exact, and what the forward pass keeps is counted; compiled layers keep
somewhat less. Working memory and times are estimates, good enough to choose a machine and settings.
Memory is an upper bound for tensors: the sum of peaks that need not coincide. Libraries, and freed blocks that malloc
keeps, are not counted; on a CPU they take up to 0.5 GiB per process.
`training_flops` and `superres_training_flops` count what the training step computes, for MFU.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Literal, get_args

import torch

from cogvideo.checkpoint.parameters import TransformerConfig, parameter_shapes
from cogvideo.model.config import AttentionName, LoraConfig, ModelConfig, Recompute, TrunkWeights
from cogvideo.model.lora import count_adapters
from cogvideo.model.loss import FROZEN_FRACTION, MAX_LOGITS
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.planning.activations import Activations, Arithmetic, Setting, count_activations, supervised_rows
from cogvideo.planning.counts import (
    attention_pairs,
    cache_bytes,
    count_parameters,
    num_rows,
    quantized_trunk_size,
    superres_pairs,
    superres_training_flops,
    training_flops,
)
from cogvideo.planning.machines import Machine
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.transformer import SuperresTransformer

PRODUCT_EFFICIENCY = 0.63
"""Fraction of a GPU's peak flops that products of large matrices are assumed to reach: 620 of an H100's 989 TFLOP/s."""
ATTENTION_EFFICIENCY = 0.25
"""The same for fused attention with heads of 64 columns."""
BANDWIDTH_EFFICIENCY = 0.84
"""Fraction of the memory bandwidth that elementwise kernels are assumed to reach: 2.8 of an H100's 3.35 TB/s."""
FORWARD_TRAFFIC, BACKWARD_TRAFFIC = 2.0, 5.5
"""Assumed bytes that elementwise kernels move per byte that a forward pass without recomputation keeps."""
FLOAT8_INPUT, FLOAT8_GRADIENT, FLOAT8_BIAS = 13.0, 23.0, 4.0
"""Bytes that `model.quantize.Float8Linear`, if not compiled, moves per element of the input and of the gradient, which
it rounds, and per element of the output, to which it adds a bias."""
BETWEEN_MACHINES = 25e9
"""Bytes per second that one GPU sends to other computers: a 200 Gb/s adapter per GPU."""
MACHINE_GPUS = 8
"""GPUs per computer."""
HOST_LINK, HOST_BANDWIDTH = 20e9, 10e9
"""Bytes per second between a GPU and CPU memory, and of CPU memory per process, for an offloaded optimiser."""
DECODING_EFFICIENCY = 0.7
"""Fraction of the memory bandwidth that reading the weights for one token typically reaches."""
USABLE_MEMORY = 0.92
"""Fraction of the memory to plan for; the driver and the allocator need the rest."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default number of gradients reduced at a time."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default number of parameters that ZeRO 3 holds gathered at a time."""
BACKWARD_ROWS = 12
"""Gradients of activations alive at once in the backward pass, in rows of hidden_size: those of the MLP, mostly."""
MAX_MICRO_BATCH = 64
PUBLISHED_BATCH = 416
"""Clips per step where none are given."""
MICRO_BATCH_SECONDS = 5e-3
"""The fixed cost of a micro-batch, whatever its size: kernel launches, waiting for the host."""
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)

ASSUMPTIONS = (
    f"estimates, from a roofline: products at {PRODUCT_EFFICIENCY:.0%} of peak, attention at "
    f"{ATTENTION_EFFICIENCY:.0%}, elementwise kernels at {BANDWIDTH_EFFICIENCY:.0%} of the memory bandwidth, no "
    "overlap; not measured"
)
"""What the step times assume, in one line."""

Held = Literal["fp32", "dtype"]


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
    """Activations that the backward pass recomputes, instead of the forward pass keeping them."""
    trunk_weights: TrunkWeights = "full"
    """`int8`, `float8`: store the frozen trunk's matrices in one byte per element."""
    batch_size: int | None = None
    """Clips per step over all devices; null: one micro-batch on each."""
    offload_optimizer: bool = False
    """Keep the optimiser and its float32 weights in CPU memory."""
    weights: Held = "dtype"
    """`fp32`: hold weights in float32, as train.weights does."""
    products: Literal["fp32", "bf16"] = "bf16"
    """With float32 weights, the type of matrix products, as train.dtype sets it; bf16: by autocast."""
    attention: AttentionName = "auto"
    """How attention is computed, as train.attention sets it."""
    gradients: Held = "dtype"
    """`fp32`: sum the gradients of micro-batches in float32, as train.gradients does."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """With a rank above 0: train adapters only, as lora.rank does."""
    ema: bool = False
    """Keep a moving average of the trained weights, as train.ema_decay does."""

    def __post_init__(self) -> None:
        for name, least, most in (("count", 1, 1 << 20), ("micro_batch", 1, 1 << 20), ("zero_stage", 0, 3)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}; expected {least} to {most}")
        if self.trunk_weights != "full" and not ((self.frozen_trunk or self.lora.rank) and self.zero_stage < 3):
            raise ValueError(
                f"trunk_weights={self.trunk_weights} needs frozen_trunk=true or lora.rank, and zero_stage=0, 1 or 2"
            )

    @property
    def arithmetic(self) -> Arithmetic:
        if self.weights == "dtype":
            return "bf16"
        return "fp32" if self.products == "fp32" else "autocast"

    @property
    def accumulation(self) -> int:
        """Micro-batches per step on each device."""
        return max(1, round((self.batch_size or 0) / (self.count * self.micro_batch)))

    def partitions(self, from_stage: int) -> int:
        """Devices that share what ZeRO partitions from this stage on."""
        return self.count if self.zero_stage >= from_stage else 1


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    forward_backward: float
    recomputation: float
    communication: float
    optimiser: float

    @property
    def total(self) -> float:
        return self.forward_backward + self.recomputation + self.communication + self.optimiser


@dataclass(frozen=True)
class TrainingBudget:
    """Bytes on each device, and the time of one step."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    """What the forward pass keeps for the backward pass."""
    working: float
    """The layer being recomputed, gradients of activations, a chunk of logits, DeepSpeed's buffers."""
    host: float
    """In CPU memory: the optimiser and gradients, if offloaded."""
    time: StepTime
    flops: float
    """Of the model, per device and step, without recomputation."""

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.working

    @property
    def seconds_per_step(self) -> float:
        return self.time.total

    def fits(self, machine: Machine) -> bool:
        return self.total < machine.memory_bytes * USABLE_MEMORY


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


def is_frozen(config: TransformerConfig, settings: TrainingSettings) -> bool:
    """Whether the trunk is frozen: image models and the iterative super-resolution model train all of their weights,
    unless adapters are trained instead."""
    if settings.lora.rank:
        return True
    has_extra_part = config.method == "direct" if isinstance(config, SuperresConfig) else config.has_temporal_channel
    return settings.frozen_trunk and has_extra_part


def trained_and_all_parameters(config: TransformerConfig, settings: TrainingSettings) -> tuple[int, int]:
    """Numbers of trained and of all parameters; both include those of adapters."""
    return _count_parameters(config, is_frozen(config, settings), settings.lora)


@lru_cache(maxsize=64)
def _count_parameters(config: TransformerConfig, frozen: bool, lora: LoraConfig) -> tuple[int, int]:
    model = SuperresTransformer if isinstance(config, SuperresConfig) else CogVideoTransformer
    shapes = parameter_shapes(config)
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    total = sum(counts.values())
    if lora.rank:
        trained = count_adapters(shapes, lora)
        return trained, total + trained
    if not frozen:
        return total, total
    return sum(count for name, count in counts.items() if model.is_extra(name)), total


def training_budget(config: TransformerConfig, machine: Machine, settings: TrainingSettings) -> TrainingBudget:
    """Memory per device and time per step. AdamW keeps float32 weights, moments and averages (if any), partitioned by
    the ZeRO stage.

    With an offloaded optimiser, ZeRO 2 copies gradients to CPU memory bucket by bucket, so none stay on the device.
    """
    trained, total = trained_and_all_parameters(config, settings)
    held = 4 if settings.weights == "fp32" else 2
    weights = float(held * total)
    if settings.trunk_weights != "full" and is_frozen(config, settings):
        quantized, quantized_bytes = quantized_trunk_size(config)
        weights += quantized_bytes - held * quantized
    summed = 4 if "fp32" in (settings.weights, settings.gradients) else 2
    gradients = summed * trained / settings.partitions(2)
    # in float32 without ZeRO, the optimiser holds no second copy of the weights
    held_by_optimiser = 8 if settings.weights == "fp32" and settings.zero_stage == 0 else 12
    optimiser = (held_by_optimiser + (4 if settings.ema else 0)) * trained / settings.partitions(1)
    host = 0.0
    if settings.offload_optimizer:
        host, optimiser = optimiser + 4 * trained / settings.partitions(1), 0.0
        if settings.zero_stage >= 2:
            host, gradients = host + 2 * trained / settings.partitions(2), 0.0
    activations = _activations(config, machine, settings)
    forward, backward = _flops(config, settings)
    return TrainingBudget(
        weights=weights / settings.partitions(3),
        gradients=gradients,
        optimiser=optimiser,
        activations=activations.kept,
        working=activations.recomputed + _working_bytes(config, settings, trained, total),
        host=host,
        time=_step_time(config, machine, settings),
        flops=settings.accumulation * settings.micro_batch * (forward + backward),
    )


def _activations(config: TransformerConfig, machine: Machine, settings: TrainingSettings) -> Activations:
    setting = Setting(
        recompute=settings.recompute,
        frozen_trunk=is_frozen(config, settings),
        lora=settings.lora,
        arithmetic=settings.arithmetic,
        attention=settings.attention,
        quantized_trunk=settings.arithmetic == "autocast" and settings.trunk_weights != "full",
        is_gpu=machine.is_gpu,
    )
    return count_activations(config, settings.micro_batch, setting)


def _working_bytes(config: TransformerConfig, settings: TrainingSettings, trained: int, total: int) -> float:
    """Bytes that a step needs temporarily, excluding what is recomputed."""
    frozen, codes = is_frozen(config, settings), config.vocabulary.num_image_tokens
    held = 4 if settings.weights == "fp32" else 2
    of_layer = BACKWARD_ROWS * settings.micro_batch * num_rows(config) * config.hidden_size * held
    logits = min(supervised_rows(config) * settings.micro_batch * codes, MAX_LOGITS)
    of_logits = 3 * 4 * logits / (FROZEN_FRACTION if frozen else 1)
    buffers = 0.0
    if settings.zero_stage > 0:
        summed = 4 if settings.gradients == "fp32" and not settings.offload_optimizer else held
        buffers = summed * min(trained, BUCKET_ELEMENTS)
    if settings.zero_stage == 3:
        buffers += held * min(total, MAX_LIVE_PARAMETERS)
    return max(of_layer, of_logits) + buffers


def _flops(config: TransformerConfig, settings: TrainingSettings) -> tuple[float, float]:
    frozen, lora = is_frozen(config, settings), settings.lora.rank > 0
    if isinstance(config, SuperresConfig):
        return superres_training_flops(config, frozen_trunk=frozen, lora=lora)
    return training_flops(config, frozen_trunk=frozen, lora=lora)


def _step_time(config: TransformerConfig, machine: Machine, settings: TrainingSettings) -> StepTime:
    h, layers, clips = config.hidden_size, config.num_layers, settings.accumulation * settings.micro_batch
    pairs = superres_pairs(config) if isinstance(config, SuperresConfig) else attention_pairs(config)
    scores = 4 * h * pairs * layers
    forward, backward = _flops(config, settings)
    # traffic follows what a forward pass without recomputation keeps
    kept = count_activations(config, 1, Setting("nothing", is_frozen(config, settings), lora=settings.lora)).kept

    def seconds(products: float, attention: float, traffic: float) -> float:
        return clips * (
            products / (machine.flops * PRODUCT_EFFICIENCY)
            + attention / (machine.flops * ATTENTION_EFFICIENCY)
            + traffic / (machine.bandwidth * BANDWIDTH_EFFICIENCY)
        )

    of_forward = seconds(forward - scores, scores, FORWARD_TRAFFIC * kept)
    of_backward = seconds(backward - 2.5 * scores, 2.5 * scores, BACKWARD_TRAFFIC * kept)
    mlps = layers * 16 * h * h * num_rows(config)
    of_mlps = seconds(mlps, 0.0, FORWARD_TRAFFIC * kept / 2)
    if _multiplies_float8(config, machine, settings):
        rows, added = num_rows(config), partial(_float8_seconds, machine, h)
        backward_rows = rows if settings.lora.rank else rows - config.text_len
        turned = settings.accumulation * 24 * h * h / (machine.bandwidth * BANDWIDTH_EFFICIENCY)
        of_forward += layers * clips * added(rows, 24, 7 * FLOAT8_INPUT + 9 * FLOAT8_BIAS)
        of_backward += layers * (clips * added(backward_rows, 24, 9 * FLOAT8_GRADIENT) + turned)
        of_mlps += layers * clips * added(rows, 16, 5 * FLOAT8_INPUT + 5 * FLOAT8_BIAS)
    again = {"nothing": 0.0, "mlp": of_mlps, "layer": of_forward}[settings.recompute]
    of_launches = settings.accumulation * MICRO_BATCH_SECONDS
    return StepTime(of_forward + of_backward + of_launches, again, *_other_times(config, machine, settings))


def _multiplies_float8(config: TransformerConfig, machine: Machine, settings: TrainingSettings) -> bool:
    """Whether the trunk's products are in float8, as `model.quantize.multiplies_float8` decides. Those of a
    super-resolution model are planned as if in bf16."""
    in_float8 = settings.trunk_weights == "float8" and is_frozen(config, settings) and settings.arithmetic != "fp32"
    return in_float8 and machine.has_float8 and isinstance(config, ModelConfig) and config.hidden_size % 16 == 0


def _float8_seconds(machine: Machine, hidden: int, rows: int, products: int, moved: float) -> float:
    """Seconds that float8 adds to a layer, negative where it saves: products take half the time, rounding takes some.

    Per row: flops of `products`, in units of hidden * hidden; bytes `moved` for rounding, in units of hidden.
    """
    saved = rows * products * hidden**2 / 2
    return rows * moved * hidden / (machine.bandwidth * BANDWIDTH_EFFICIENCY) - saved / (
        machine.flops * PRODUCT_EFFICIENCY
    )


def _other_times(config: TransformerConfig, machine: Machine, settings: TrainingSettings) -> tuple[float, float]:
    """Seconds of communication and of the optimiser, per step."""
    trained, total = trained_and_all_parameters(config, settings)
    held = 4 if settings.weights == "fp32" else 2
    summed = 4 if "fp32" in (settings.weights, settings.gradients) else 2
    others, times = (settings.count - 1) / settings.count, settings.accumulation
    # a reduce-scatter moves all gradients once, an all-reduce twice
    reductions = {0: 2.0, 1: 2.0, 2: float(times), 3: float(times)}[settings.zero_stage]
    moved = others * summed * trained * reductions
    if settings.zero_stage in (1, 2):
        moved += others * held * trained  # the updated weights
    if settings.zero_stage == 3:
        moved += others * held * total * times * (3 if settings.recompute == "layer" else 2)
    link = machine.link if settings.count <= MACHINE_GPUS else min(machine.link, BETWEEN_MACHINES)
    # AdamW reads and writes weights and moments, and reads gradients; averages are read and written, and weights read
    updated = (28 + (12 if settings.ema else 0)) * trained / settings.partitions(1)
    if not settings.offload_optimizer:
        return moved / link, updated / (machine.bandwidth * BANDWIDTH_EFFICIENCY)
    copied = held * trained * (times + 1) / settings.partitions(2)
    return moved / link, updated / HOST_BANDWIDTH + copied / HOST_LINK


def settings_that_fit(
    config: TransformerConfig, machine: Machine, tried: Iterable[TrainingSettings]
) -> list[tuple[TrainingSettings, TrainingBudget]]:
    """Those that fit the machine, fastest first; among equally fast ones, those that need less memory first."""
    pairs = [(settings, training_budget(config, machine, settings)) for settings in tried]
    fitting = [pair for pair in pairs if pair[1].fits(machine)]
    return sorted(fitting, key=lambda pair: (pair[1].seconds_per_step, pair[1].total))


def micro_batches(batch_size: int, count: int) -> list[int]:
    """The micro-batches that divide each device's share of the batch, up to a size beyond which there is no gain."""
    share = max(1, batch_size // count)
    return [size for size in range(1, min(share, MAX_MICRO_BATCH) + 1) if share % size == 0]


def suggestions(
    config: TransformerConfig, machine: Machine, settings: TrainingSettings
) -> list[tuple[TrainingSettings, TrainingBudget]]:
    """Settings that fit the machine, fastest first; empty if none does.

    Micro-batch, recomputation and ZeRO stage are varied. What costs more is tried only if nothing else fits: an int8
    trunk, then an offloaded optimiser. Without a batch size, the published one is rounded down to a multiple of the
    number of devices.
    Raises: ValueError if a given batch cannot be divided among the devices, which training would refuse.
    """
    frozen, count = is_frozen(config, settings), settings.count
    batch_size = settings.batch_size or max(1, PUBLISHED_BATCH // count) * count
    if batch_size % count:
        raise ValueError(f"training.batch_size={batch_size} cannot be divided among {count} devices; choose a multiple")
    base = replace(settings, batch_size=batch_size)
    leaner = [base]
    if frozen and settings.trunk_weights == "full":
        leaner.append(replace(base, trunk_weights="int8", zero_stage=min(base.zero_stage, 2)))
    if not settings.offload_optimizer:
        leaner += [replace(lean, offload_optimizer=True) for lean in leaner]
    for lean in leaner:
        stages = [2] if lean.offload_optimizer else [1, 2] if frozen else [1, 2, 3]
        choices = itertools.product(stages, RECOMPUTE, micro_batches(batch_size, count))
        found = settings_that_fit(
            config,
            machine,
            [replace(lean, zero_stage=z, recompute=r, micro_batch=m) for z, r, m in choices],
        )
        if found:
            return found
    return []


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
