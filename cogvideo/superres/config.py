"""The sizes of a super-resolution model."""

from dataclasses import dataclass, field
from typing import Literal

from cogvideo.sequence.layout import Vocabulary

MIN_ITERATIVE_SIDE = 6
"""The iterative model's grid must hold one whole `grid.ROUND_PATTERN`, or some rounds would redraw nothing."""


@dataclass(frozen=True)
class SuperresConfig:
    """Source: CogView2 (2204.14217)."""

    method: Literal["direct", "iterative"] = "direct"
    """direct: draws a fine grid from a coarse one in one forward pass; iterative: redraws parts of a fine grid."""
    num_layers: int = 48
    hidden_size: int = 3072
    num_heads: int = 48
    text_len: int = 96
    low_res_side: int = 20
    """Tokens along a side of the low-resolution grid that the direct model reads."""
    high_res_side: int = 60
    num_positions: int = 1024
    """Rows of the trunk's position table; the extra table has one row per high-resolution token."""
    low_res_position_start: int = 513
    """The first coarse token's row in the trunk's position table: an image's second slot, since BOI takes the first."""
    dropout: float = 0.1
    """After embeddings and on the MLP's output, in training."""
    attention_dropout: float = 0.1
    """On attention probabilities, in training: in all rows of the direct model, in fine rows of the iterative model."""
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "text_len", "low_res_side", "high_res_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"superres.{name}={getattr(self, name)}; expected at least 1")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"superres.{name}={getattr(self, name)}; expected a probability from 0 to below 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"superres.hidden_size={self.hidden_size} is not a multiple of superres.num_heads={self.num_heads}; "
                "change one"
            )
        if self.method == "direct" and self.high_res_side % self.low_res_side:
            raise ValueError(
                f"superres.high_res_side={self.high_res_side} is not a multiple of "
                f"superres.low_res_side={self.low_res_side}; change one"
            )
        if self.method == "iterative" and self.high_res_side < MIN_ITERATIVE_SIDE:
            raise ValueError(
                f"superres.high_res_side={self.high_res_side} leaves some rounds of the iterative model nothing to "
                f"redraw; give at least {MIN_ITERATIVE_SIDE}"
            )

    @property
    def low_res_len(self) -> int:
        """Tokens of the coarse grid that the model reads with the text."""
        return self.low_res_side**2 if self.method == "direct" else 0

    @property
    def high_res_len(self) -> int:
        """Tokens of the fine grid."""
        return self.high_res_side**2

    @property
    def max_caption_len(self) -> int:
        """Tokens of a caption that are read; the direct model leaves one position free, as published."""
        return self.text_len - 1 if self.method == "direct" else self.text_len

    @property
    def context_attention_dropout(self) -> float:
        """Attention dropout of context rows, in training."""
        return self.attention_dropout if self.method == "direct" else 0.0
