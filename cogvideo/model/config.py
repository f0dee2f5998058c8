"""The transformer's configuration. Plain data: it needs no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from cogvideo.sequence.layout import ClipLayout, Vocabulary

ModelTask = Literal["image", "sequential", "interpolation"]
Recompute = Literal["nothing", "mlp", "layer"]
"""Activations that the backward pass recomputes: none, those from attention to the MLP's output, or all but each
layer's input."""
AttentionName = Literal["auto", "sdpa", "cpu", "flex", "dense"]
"""How attention is computed in passes over many rows: `sdpa` in blocks of rows that share keys; `cpu` in tiles where
these are faster; `flex` and `dense` over text and frames as one sequence, by FlexAttention or with all pairs of rows;
`auto` chooses by device."""
TrunkWeights = Literal["full", "int8", "float8"]
"""How a frozen trunk's matrices are stored in training."""
MAX_LORA_RANK = 4096
"""Above the width of any model here, where a rank would not be low."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen matrices. Source: LoRA (2106.09685)."""

    rank: int = 0
    """Rank of each matrix's update; 0: no adapters, all weights are trained."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """On the adapters' input, in training."""
    targets: tuple[str, ...] = ()
    """Which matrices: parts (`spatial`, `temporal`, `high_res`, `mlp`, `embeddings`) or patterns of layer names, for
    example `layers.*.mlp.dense_4h_to_h`; empty: all but the word embeddings."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which suits large ranks. Source: rsLoRA (2312.03732)."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= MAX_LORA_RANK:
            raise ValueError(f"lora.rank={self.rank}; expected 0 (no adapters) to {MAX_LORA_RANK}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha}; expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout}; expected a probability from 0 to below 1")

    @property
    def scale(self) -> float:
        """The multiplier of the product of the two factors."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """Defaults are the published CogVideo stage 1 (2205.15868; 7.72 B parameters)."""

    task: ModelTask = "sequential"
    """`image`: the text-to-image trunk; `sequential`: stage 1; `interpolation`: stage 2."""
    num_layers: int = 48
    hidden_size: int = 3072
    num_heads: int = 48
    text_len: int = 64
    """Maximum number of text tokens; shorter texts are padded on the left and masked."""
    frame_side: int = 20
    """Tokens along each side of a frame."""
    num_frames: int = 5
    """Frames per clip; an image model always has one."""
    learn_first_frame: bool = False
    """Sequential models only: train on and sample frame 0 as well, with the clip's length in the text; false, as
    published, leaves that frame to the trunk."""
    window_size: int | None = None
    """Side of the temporal channel's windows in tokens, shifted by half on odd layers; null for full attention."""
    num_positions: int = 1024
    """Rows of the trunk's position table: text begins at 0, frame 0 at frame_position_start."""
    frame_position_start: int = 512
    dropout: float = 0.1
    """After embeddings and on the MLP's output, in training."""
    attention_dropout: float = 0.1
    """On attention probabilities, in training."""
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "text_len", "frame_side", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}; expected at least 1")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}; expected a probability from 0 to below 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}; "
                "choose a divisor"
            )
        if self.window_size is not None and (self.window_size < 1 or self.frame_side % self.window_size):
            raise ValueError(
                f"model.window_size={self.window_size} does not divide the frame grid "
                f"{self.frame_side}x{self.frame_side}; "
                f"choose a divisor of {self.frame_side}, or null for full attention"
            )
        if self.text_len > self.frame_position_start:
            raise ValueError(
                f"model.text_len={self.text_len} runs into the frames' positions at "
                f"model.frame_position_start={self.frame_position_start}; lower it"
            )
        if self.frame_position_start + self.frame_side**2 > self.num_positions:
            raise ValueError(
                f"model.num_positions={self.num_positions} leaves no room for a frame of {self.frame_side**2} slots "
                f"from model.frame_position_start={self.frame_position_start}; raise it"
            )
        _ = self.layout  # raises if the task cannot have this number of frames

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def frame_len(self) -> int:
        return self.frame_side**2

    @property
    def has_temporal_channel(self) -> bool:
        return self.task != "image"

    @property
    def num_extra_positions(self) -> int:
        """Rows of the extra position table. As in the published table, the last frame_len rows are never read."""
        return self.num_frames * self.frame_len if self.has_temporal_channel else 0

    @property
    def layout(self) -> ClipLayout:
        if self.task == "image":
            return ClipLayout.image(self.text_len, self.frame_side)
        if self.task == "interpolation":
            return ClipLayout.interpolation(self.text_len, self.frame_side, self.num_frames)
        return ClipLayout.sequential(
            self.text_len, self.frame_side, self.num_frames, learn_first_frame=self.learn_first_frame
        )
