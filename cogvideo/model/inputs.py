"""What callers pass to the model: text biases, a cache, and the inputs of a decoding step. Plain data.

`Cache` is what the model needs of a cache; `cogvideo.inference.backends` implements it.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cogvideo.model.plan import DecodeMasks

Channel = Literal["spatial", "temporal"]


class TextBias(NamedTuple):
    """Added to the attention scores of text keys, -inf on padding; one (batch, text_len) tensor per channel."""

    spatial: Tensor
    temporal: Tensor

    @classmethod
    def from_mask(
        cls, text_mask: Tensor, spatial_bonus: float | Tensor = 0.0, temporal_bonus: float | Tensor = 0.0
    ) -> "TextBias":
        """From a mask (batch, text_len), False on padding.

        The bonuses, one for all clips or (batch, 1), are the "attention upweighting" of sampling; training has none.
        """
        padding = ~text_mask

        def bias(bonus: float | Tensor) -> Tensor:
            return (torch.zeros(text_mask.shape, device=text_mask.device) + bonus).masked_fill_(padding, float("-inf"))

        return cls(bias(spatial_bonus), bias(temporal_bonus))


class ChannelCache(Protocol):
    """Keys and values of one channel in one layer."""

    key: Tensor
    value: Tensor
    """(batch, heads, text_len + positions, head_dim): text first, then frame slots."""
    text_len: int

    def store_text(self, key: Tensor, value: Tensor) -> None:
        """Shapes: (batch, heads, text_len, head_dim)."""

    def store_frames(self, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Shapes: positions (rows,); key, value (batch, heads, rows, head_dim)."""

    def read_text(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of text as they were stored, possibly rounded to fewer bits."""
        ...

    def read_frames(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of all frame positions."""
        ...


class Cache(Protocol):
    """Keys and values of a batch of clips in all layers."""

    def channel(self, layer: int, channel: Channel) -> ChannelCache | None:
        """None if the cache was made without that channel."""
        ...


class Draw(Protocol):
    """Holds the tokens of a batch of clips, gives a decoding step its inputs, and samples from its logits."""

    def input_tokens(self, slots: Tensor) -> Tensor:
        """Input tokens (batch, rows) of slots (rows,)."""
        ...

    def __call__(self, logits: Tensor, slots: Tensor) -> Tensor:
        """Sample tokens (clips, rows) from logits (batch, rows, num_image_tokens), and write them for later steps."""
        ...


class DecodeInputs(NamedTuple):
    """One decoding step: a few slots of a batch of clips whose text is in the cache."""

    tokens: Tensor | None
    """(batch, rows) input token ids; None: those of `draw`, see `input_tokens`."""
    slots: Tensor
    """(rows,) int64, any slots."""
    masks: DecodeMasks
    text_bias: TextBias
    cache: Cache
    draw: Draw | None = None
    """Samples tokens from the step's logits; None: the logits are the result."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, rows)."""
        return len(self.text_bias.spatial), len(self.slots)

    def input_tokens(self) -> Tensor:
        """(batch, rows) input token ids."""
        if self.tokens is not None:
            return self.tokens
        assert self.draw is not None, "a step without tokens needs a draw that supplies them"
        return self.draw.input_tokens(self.slots)

    def finish(self, logits: Tensor) -> Tensor:
        """The step's result: tokens (clips, rows), or the logits if there is no `draw`."""
        return logits if self.draw is None else self.draw(logits, self.slots)

    def pad_rows(self, rows: int) -> "DecodeInputs":
        """Pad to `rows` by repeating the last row: its key is stored again, and its result is repeated."""
        missing = rows - len(self.slots)
        if not missing:
            return self
        tokens = None if self.tokens is None else torch.cat([self.tokens, self.tokens[:, -1:].expand(-1, missing)], 1)
        return self._replace(tokens=tokens, slots=torch.cat([self.slots, self.slots[-1:].expand(missing)]))
