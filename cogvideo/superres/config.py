"""The sizes of a super-resolution model."""

from dataclasses import dataclass, field
from typing import Literal

from cogvideo.sequence.vocabulary import Vocabulary


@dataclass(frozen=True)
class SuperresConfig:
    """Source: CogView2 (2204.14217)."""

    method: Literal["direct", "iterative"] = "direct"
    """direct: draws a fine grid from a coarse one in one forward; iterative: redraws parts of a fine grid."""
    num_layers: int = 48
    hidden_size: int = 3072
    num_heads: int = 48
    text_len: int = 96
    low_res_side: int = 20
    """Tokens along a side of the low-resolution grid that the direct model reads."""
    high_res_side: int = 60
    num_positions: int = 1024
    """Rows of the trunk's position table; the extra table holds one row a high-resolution token."""
    low_res_position_start: int = 513
    """The first coarse token's row in the trunk's table, where a picture has its second slot: what reads it sees it."""
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"superres.hidden_size={self.hidden_size} is no multiple of superres.num_heads={self.num_heads}; "
                "change one"
            )
        if self.method == "direct" and self.high_res_side % self.low_res_side:
            raise ValueError(
                f"superres.high_res_side={self.high_res_side} is no multiple of "
                f"superres.low_res_side={self.low_res_side}; change one"
            )

    @property
    def low_res_len(self) -> int:
        """Tokens of the coarse grid that the model reads beside the text."""
        return self.low_res_side**2 if self.method == "direct" else 0

    @property
    def high_res_len(self) -> int:
        """Tokens of the fine grid."""
        return self.high_res_side**2
