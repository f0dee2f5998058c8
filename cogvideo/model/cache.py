"""Keys and values of slots already computed: allocated once by whoever decodes, handed to the model, which fills it.

The temporal channel sees the clip, so its cache has a place for every slot; the spatial one sees a slot's own frame, so
its cache needs room for no more than the frames that are being made. Plans say where a slot is kept.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cogvideo.model.config import ModelConfig

if TYPE_CHECKING:
    from cogvideo.model.decode_layers import Tie


@dataclass
class ChannelCache:
    """One channel of one layer: keys and values of text and of frame slots."""

    text_key: Tensor
    text_value: Tensor
    """(batch, heads, text_len, head_dim)."""
    frame_key: Tensor
    frame_value: Tensor
    """(batch, heads, places, head_dim)."""

    def clips(self, part: slice) -> "ChannelCache":
        """The same memory for some clips of the batch."""
        return ChannelCache(self.text_key[part], self.text_value[part], self.frame_key[part], self.frame_value[part])

    def store_text(self, key: Tensor, value: Tensor) -> None:
        self.text_key.copy_(key)
        self.text_value.copy_(value)

    def store_frames(self, places: Tensor, key: Tensor, value: Tensor) -> None:
        self.frame_key.index_copy_(2, places, key.to(self.frame_key.dtype))
        self.frame_value.index_copy_(2, places, value.to(self.frame_value.dtype))


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
    tie: "Tie | None" = None
    """This memory as decode_layers.py wants it, made when it is first asked for."""

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        text_len: int,
        *,
        temporal: bool = True,
        spatial_places: int | None = None,
        temporal_places: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KVCache":
        """Room for `batch` clips with `text_len` text rows and so many frame slots a channel (default: the clip's)."""

        def channel(places: int | None) -> ChannelCache:
            def room(rows: int) -> Tensor:
                return torch.zeros(batch, config.num_heads, rows, config.head_dim, dtype=dtype, device=device)

            frames = config.layout.num_slots if places is None else places
            return ChannelCache(room(text_len), room(text_len), room(frames), room(frames))

        def layer() -> LayerCache:
            both = temporal and config.has_temporal_channel
            return LayerCache(channel(spatial_places), channel(temporal_places) if both else None)

        return cls([layer() for _ in range(config.num_layers)])

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
