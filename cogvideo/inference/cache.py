"""Keys and values of slots already computed: allocated once by the engine's backend, filled and read by the model.

The temporal channel sees the whole clip, so its cache has a position for every slot; the spatial channel sees a slot's
own frame, so its cache needs room for the frames in flight only. Plans say at which position a slot is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideo.model.config import ModelConfig
from cogvideo.model.inputs import Channel
from cogvideo.model.transformer import CogVideoTransformer


@dataclass(eq=False)
class ChannelKV:
    """`model.inputs.ChannelCache`: keys and values of one channel in one layer."""

    key: Tensor
    value: Tensor
    """(batch, heads, text_len + positions, head_dim): text and frames side by side, as attention takes them."""
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
        """The same memory for some clips of the batch."""
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
        """Room for `batch` clips with `text_len` text rows and a number of frame slots per channel (default: all)."""

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
        """The same memory for some clips of the batch."""
        return KVCache([c.select(clips) for c in self.spatial], [c.select(clips) for c in self.temporal])

    @property
    def num_bytes(self) -> int:
        return sum(c.key.nbytes + c.value.nbytes for c in (*self.spatial, *self.temporal))


def cache_dtype(model: CogVideoTransformer) -> torch.dtype:
    """The activations' dtype; float16 if weights are stored in fewer bits than float32 activations.

    Decoding time is the time to read memory, so the cache is then halved as well.
    """
    activations = model.final_layernorm.weight.dtype
    half = activations == torch.float32 != model.word_embeddings.weight.dtype
    return torch.float16 if half else activations
