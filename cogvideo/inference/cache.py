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
    from cogvideo.kernels.decode_cpu import Tie
    from cogvideo.kernels.graphs import Replay


@dataclass
class ChannelCache:
    """One channel of one layer: keys and values of text and of frame slots."""

    key: Tensor
    value: Tensor
    """(batch, heads, text_len + places, head_dim): text and frames side by side, as attention takes them."""
    text_len: int

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (batch, heads, text_len, head_dim)."""
        return self.key[:, :, : self.text_len], self.value[:, :, : self.text_len]

    @property
    def frames(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (batch, heads, places, head_dim)."""
        return self.key[:, :, self.text_len :], self.value[:, :, self.text_len :]

    def clips(self, part: slice) -> "ChannelCache":
        """The same memory for some clips of the batch."""
        return ChannelCache(self.key[part], self.value[part], self.text_len)

    def store_text(self, key: Tensor, value: Tensor) -> None:
        for kept, new in zip(self.text, (key, value), strict=True):
            kept.copy_(new)

    def store_frames(self, places: Tensor, key: Tensor, value: Tensor) -> None:
        places = places + self.text_len
        self.key.index_copy_(2, places, key.to(self.key.dtype))
        self.value.index_copy_(2, places, value.to(self.value.dtype))


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
    """This memory as decode_step.py wants it, made when it is first asked for."""
    replay: "Replay | None" = None
    """Steps that were recorded on it."""

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
            rows = text_len + (config.layout.num_slots if places is None else places)
            size = (batch, config.num_heads, rows, config.head_dim)
            key, value = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
            return ChannelCache(key, value, text_len)

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
        return sum(c.key.nbytes + c.value.nbytes for c in channels)
