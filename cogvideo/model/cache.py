"""Keys and values of slots already computed: allocated once by whoever decodes, handed to the model, which fills it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cogvideo.model.config import ModelConfig

if TYPE_CHECKING:
    from cogvideo.model.decode_layers import DecodeLayers


@dataclass
class ChannelCache:
    """One channel of one layer: keys and values of text and of every clip slot."""

    text_key: Tensor
    text_value: Tensor
    """(batch, heads, text_len, head_dim)."""
    frame_key: Tensor
    frame_value: Tensor
    """(batch, heads, num_slots, head_dim), indexed by clip slot."""

    def clips(self, part: slice) -> "ChannelCache":
        """The same memory for some clips of the batch."""
        return ChannelCache(self.text_key[part], self.text_value[part], self.frame_key[part], self.frame_value[part])

    def store_text(self, key: Tensor, value: Tensor) -> None:
        self.text_key.copy_(key)
        self.text_value.copy_(value)

    def store_frames(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        self.frame_key.index_copy_(2, slots, key.to(self.frame_key.dtype))
        self.frame_value.index_copy_(2, slots, value.to(self.frame_value.dtype))


@dataclass
class LayerCache:
    spatial: ChannelCache
    temporal: ChannelCache | None

    def clips(self, part: slice) -> "LayerCache":
        return LayerCache(self.spatial.clips(part), None if self.temporal is None else self.temporal.clips(part))


@dataclass
class KVCache:
    """Every layer's keys and values for a batch of clips."""

    layers: list[LayerCache]
    decode_layers: "DecodeLayers | None" = None
    """The model's layers tied to this memory, made by the model when it first decodes."""

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        text_len: int,
        *,
        temporal: bool = True,
        num_slots: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KVCache":
        """Room for `batch` clips with `text_len` text rows and `num_slots` slots (default: the whole clip)."""
        num_slots = config.layout.num_slots if num_slots is None else num_slots

        def channel() -> ChannelCache:
            def room(rows: int) -> Tensor:
                return torch.zeros(batch, config.num_heads, rows, config.head_dim, dtype=dtype, device=device)

            return ChannelCache(room(text_len), room(text_len), room(num_slots), room(num_slots))

        both = temporal and config.has_temporal_channel
        return cls([LayerCache(channel(), channel() if both else None) for _ in range(config.num_layers)])

    def clips(self, part: slice) -> "KVCache":
        """The same memory for some clips of the batch."""
        return KVCache([layer.clips(part) for layer in self.layers])

    @property
    def num_bytes(self) -> int:
        channels = (c for layer in self.layers for c in (layer.spatial, layer.temporal) if c is not None)
        return sum(
            t.numel() * t.element_size()
            for c in channels
            for t in (c.text_key, c.text_value, c.frame_key, c.frame_value)
        )
