"""KV caches and backends: how decoding steps run. Each backend keeps its own native handles or recorded graphs.

    eager      plain PyTorch operations: the reference, and the default on a GPU
    cpu        the kernels of `cogvideo.kernels`, one call per step: the default on a CPU
    compiled   torch.compile and CUDA graphs

An engine selects one by name, once. Passes over many rows (training, scoring, prefill) do not use a backend:
`install_kernels` sets up the fast implementations that a model uses for them.

Caches hold keys and values of slots already computed: allocated once per batch, filled and read by the model. The
temporal channel sees the whole clip, so its cache has a position for every slot; the spatial channel sees only a slot's
own frame, so its cache needs room only for the frames in flight. Plans give the position at which a slot is stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cogvideo.model.config import AttentionName, ModelConfig
from cogvideo.model.decode import decode_layers
from cogvideo.model.inputs import Cache, Channel, DecodeInputs, Draw
from cogvideo.model.joined import flex_is_available
from cogvideo.model.quantize import set_linear_kernel
from cogvideo.model.transformer import CogVideoTransformer, compile_layer
from cogvideo.sequence.batch import TEXT_MULTIPLE

try:
    from cogvideo.kernels import cpu, decode_cpu
except ModuleNotFoundError:  # kernels are optional
    cpu = decode_cpu = None  # type: ignore[assignment]

Decode = Callable[[DecodeInputs], Tensor]
"""Computes the logits of a step: `CogVideoTransformer.decode`, possibly with compiled layers."""


@dataclass(eq=False)
class ChannelKV:
    """`model.inputs.ChannelCache`: keys and values of one channel in one layer."""

    key: Tensor
    value: Tensor
    """(batch, heads, text_len + positions, head_dim): text, then frames, the layout that attention takes."""
    text_len: int

    def store_text(self, key: Tensor, value: Tensor) -> None:
        self.key[:, :, : self.text_len].copy_(key)
        self.value[:, :, : self.text_len].copy_(value)

    def store_frames(self, positions: Tensor, key: Tensor, value: Tensor) -> None:
        positions = positions + self.text_len
        self.key.index_copy_(2, positions, key.to(self.key.dtype))
        self.value.index_copy_(2, positions, value.to(self.value.dtype))

    def read_text(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.key[:, :, : self.text_len].to(dtype), self.value[:, :, : self.text_len].to(dtype)

    def read_frames(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.key[:, :, self.text_len :].to(dtype), self.value[:, :, self.text_len :].to(dtype)

    def select(self, clips: slice) -> "ChannelKV":
        """A view of the same memory for some clips of the batch."""
        return ChannelKV(self.key[clips], self.value[clips], self.text_len)


@dataclass(eq=False)
class KVCache:
    """`model.inputs.Cache`: every layer's keys and values for a batch of clips."""

    spatial: list[ChannelKV]
    temporal: list[ChannelKV]
    """By layer; empty if the channel is off."""

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        text_len: int,
        *,
        temporal: bool = True,
        spatial_capacity: int | None = None,
        temporal_capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KVCache":
        """Allocate room for `batch` clips: `text_len` text rows, and frame slots per channel (default: all of them)."""

        def channels(capacity: int | None) -> list[ChannelKV]:
            rows = text_len + (config.layout.num_slots if capacity is None else capacity)
            size = (batch, config.num_heads, rows, config.head_dim)
            buffers = [[torch.zeros(size, dtype=dtype, device=device) for _ in "kv"] for _ in range(config.num_layers)]
            return [ChannelKV(key, value, text_len) for key, value in buffers]

        use_temporal = temporal and config.has_temporal_channel
        return cls(channels(spatial_capacity), channels(temporal_capacity) if use_temporal else [])

    def channel(self, layer: int, channel: Channel) -> ChannelKV | None:
        channels = self.spatial if channel == "spatial" else self.temporal
        return channels[layer] if channels else None

    def select(self, clips: slice) -> "KVCache":
        """A view of the same memory for some clips of the batch."""
        return KVCache([c.select(clips) for c in self.spatial], [c.select(clips) for c in self.temporal])

    @property
    def num_bytes(self) -> int:
        return sum(c.key.nbytes + c.value.nbytes for c in (*self.spatial, *self.temporal))


def cache_dtype(model: CogVideoTransformer) -> torch.dtype:
    """The activations' dtype, or float16 if activations are float32 and weights are stored in fewer bits.

    Decoding is bound by memory bandwidth, so with smaller weights the cache is halved as well.
    """
    activations = model.final_layernorm.weight.dtype
    half = activations == torch.float32 != model.word_embeddings.weight.dtype
    return torch.float16 if half else activations


class Backend(Protocol):
    """Runs one model."""

    text_multiple: int
    """Texts are padded to a multiple of this many tokens, so that few shapes are compiled; 1: no padding."""
    keeps_batches: bool
    """Whether a batch's memory is kept for the next batch of the same kind, because graphs are recorded for it."""

    def allocate(
        self, batch: int, text_len: int, *, temporal: bool, spatial_capacity: int, temporal_capacity: int
    ) -> KVCache:
        """A cache for a batch of clips; arguments as in `KVCache.allocate`."""
        ...

    def decode(self, steps: Sequence[DecodeInputs]) -> list[Tensor | Exception]:
        """The result of each step (see `DecodeInputs.finish`), valid until the next call, or that step's error.

        Shapes: tokens (clips, rows) int64, or logits (batch, rows, num_image_tokens) float32.
        """
        ...


def attempt(step: Callable[[], Tensor]) -> Tensor | Exception:
    """A step's result or its error, so that a failing step does not stop the others in the same pass."""
    try:
        return step()
    except Exception as error:
        return error


class EagerBackend:
    keeps_batches = False

    def __init__(self, model: CogVideoTransformer) -> None:
        self.model = model
        set_linear_kernel(model, None)
        self.text_multiple = TEXT_MULTIPLE if model.final_layernorm.weight.device.type == "cuda" else 1

    def allocate(
        self, batch: int, text_len: int, *, temporal: bool, spatial_capacity: int, temporal_capacity: int
    ) -> KVCache:
        return KVCache.allocate(
            self.model.config,
            batch,
            text_len,
            temporal=temporal,
            spatial_capacity=spatial_capacity,
            temporal_capacity=temporal_capacity,
            dtype=cache_dtype(self.model),
            device=self.model.final_layernorm.weight.device,
        )

    def decode(self, steps: Sequence[DecodeInputs]) -> list[Tensor | Exception]:
        return [attempt(partial(self._run, step)) for step in steps]

    def _run(self, step: DecodeInputs) -> Tensor:
        return step.finish(self.model.decode(step))


class CpuBackend(EagerBackend):
    """Runs steps in the kernels; unsupported ones run as in `EagerBackend`, with the kernels' products of few rows."""

    def __init__(self, model: CogVideoTransformer) -> None:
        super().__init__(model)
        set_linear_kernel(model, cpu.linear)
        self._handles: WeakKeyDictionary[Cache, decode_cpu.NativeHandle] = WeakKeyDictionary()

    def decode(self, steps: Sequence[DecodeInputs]) -> list[Tensor | Exception]:
        if not decode_cpu.is_supported(self.model, steps):
            return super().decode(steps)
        for step in steps:
            if step.cache not in self._handles:
                self._handles[step.cache] = decode_cpu.NativeHandle(self.model, step.cache)
        logits = decode_cpu.decode_step(self.model, steps, [self._handles[step.cache] for step in steps])
        return [attempt(partial(step.finish, of_step)) for step, of_step in zip(steps, logits, strict=True)]


class CompiledBackend(EagerBackend):
    """For GPUs: layers are compiled when a shape first occurs; steps are recorded as CUDA graphs and replayed.

    The graph of a step with a `draw` also reads the input tokens, samples, and writes the sampled tokens. To keep the
    number of shapes small, steps are padded to a power of 2 rows.
    """

    keeps_batches = True

    def __init__(self, model: CogVideoTransformer) -> None:
        from cogvideo.kernels.graphs import Graphs

        super().__init__(model)
        self.text_multiple = TEXT_MULTIPLE
        layers = decode_layers(model)
        self._decode = partial(
            model.decode,
            layers=layers,
            run_layer=compile_layer(type(layers[0])),
            key_blocks=flex_is_available(model.final_layernorm.weight.device, model.config.head_dim),
        )
        self._new_graphs = Graphs
        self._graphs: WeakKeyDictionary[Cache, Graphs] = WeakKeyDictionary()

    def _run(self, step: DecodeInputs) -> Tensor:
        if step.cache not in self._graphs:
            self._graphs[step.cache] = self._new_graphs()
        graphs, rows, draw = self._graphs[step.cache], len(step.slots), step.draw
        step = step.pad_rows(1 << (rows - 1).bit_length())
        key = len(step.slots), draw is not None
        if draw is None:
            result = graphs.run(key, partial(_logits, self._decode, step), step.input_tokens(), step.slots)
        else:
            result = graphs.run(key, partial(_sample, self._decode, step, draw), step.slots)
        return result[:, :rows]


def _logits(decode: Decode, step: DecodeInputs, tokens: Tensor, slots: Tensor) -> Tensor:
    return decode(step._replace(tokens=tokens, slots=slots))


def _sample(decode: Decode, step: DecodeInputs, draw: Draw, slots: Tensor) -> Tensor:
    return draw(decode(step._replace(slots=slots)), slots)


BACKENDS: dict[str, Callable[[CogVideoTransformer], Backend]] = {"eager": EagerBackend}
if decode_cpu is not None:
    BACKENDS |= {"cpu": CpuBackend, "compiled": CompiledBackend}


def open_backend(name: str, model: CogVideoTransformer) -> Backend:
    """Create a backend of `BACKENDS`; "auto" chooses by the model's device.

    Raises: ValueError if the backend is not available, or does not run on this device.
    """
    device = model.final_layernorm.weight.device.type
    if name == "auto":
        name = "cpu" if device == "cpu" and "cpu" in BACKENDS else "eager"
    if name not in BACKENDS:
        raise ValueError(f"backend={name} is not available; choose among auto, {', '.join(BACKENDS)}")
    if (name == "compiled" and device == "cpu") or (name == "cpu" and device != "cpu"):
        raise ValueError(f"backend={name} does not run on {device}; choose auto or eager")
    return BACKENDS[name](model)


def install_kernels(model: nn.Module, device: torch.device | None = None, attention: AttentionName = "auto") -> None:
    """Set up a model's layers for fast passes over many rows on `device` (default: where the model is).

    On a CPU this means the kernels of `cogvideo.kernels`, if installed; on a GPU FlexAttention, or dense attention
    where it is not available. Raises: ValueError if `attention` is not available on this device.
    """
    device = device or next(model.parameters()).device
    has_kernels = device.type == "cpu" and cpu is not None
    set_linear_kernel(model, cpu.linear if has_kernels else None)
    if not isinstance(model, CogVideoTransformer):
        return
    if has_kernels:
        from cogvideo.kernels import tiled_attention  # noqa: F401  (adds itself to ATTENTION)
    has_flex = flex_is_available(device, model.config.head_dim)
    if attention == "auto":
        on_gpu: AttentionName = "flex" if has_flex else "dense"
        attention = on_gpu if device.type == "cuda" else "cpu" if has_kernels else "sdpa"
    if (attention == "flex" and not has_flex) or (attention == "cpu" and not has_kernels):
        raise ValueError(
            f"attention={attention} is not available on {device.type} for heads of {model.config.head_dim} columns; "
            "choose auto, sdpa or dense"
        )
    model.use_attention(attention)
