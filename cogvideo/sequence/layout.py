"""Token ids and clip layouts as data: which frames attend to which, their order of generation, which are learned.

`Vocabulary` has the ids that the model and its tokenizers share. `ClipLayout` holds all differences in attention,
except windows, between a text-to-image trunk, stage 1 and stage 2: masks, decoding orders and loss masks follow from
it. No tensors here, and no model.

Terms used everywhere: a *frame* is a square grid of tokens; a *slot* is one place in the clip, with the number
frame * frame_len + raster. Slot j of a frame predicts token j; its input is token j-1 of that frame, or BOI
(beginning of image, `Vocabulary.start_of_image`) if j = 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Vocabulary:
    """Joint vocabulary: image tokens, then text pieces. Defaults are the published (icetk) ids."""

    size: int = 150010
    """Rows of the embedding table; published tables have a few more rows than there are pieces."""
    num_image_tokens: int = 20000
    """Ids [0, num_image_tokens) are codes of the image tokenizer; only these are predicted."""
    pad: int = 20003
    """`<pad>`: pads text on the left; masked, so its embedding has no effect."""
    newline: int = 20004
    """`<n>`: separates the clip length from the caption."""
    start_of_image: int = 150000
    """BOI, `<start_of_image>`: the input of the first slot of every frame."""

    def __post_init__(self) -> None:
        if self.num_image_tokens < 1:
            raise ValueError(f"vocabulary.num_image_tokens={self.num_image_tokens}; expected at least 1")
        for name in ("pad", "newline", "start_of_image"):
            value = getattr(self, name)
            if not self.num_image_tokens <= value < self.size:
                raise ValueError(
                    f"vocabulary.{name}={value} is not in the text ids [{self.num_image_tokens}, {self.size}); "
                    "give the id that the text tokenizer has for it"
                )


@dataclass(frozen=True)
class FrameSpec:
    """One frame of a clip. Source: CogVideo (2205.15868) section 3, as one rule for both stages."""

    order: int
    """Generation order: in the temporal channel, a frame attends to frames with a lower order."""
    causal: bool
    """Among frames of its own order, whether a slot attends only up to itself in raster order, or to all slots."""
    supervised: bool
    """Whether the frame's tokens are learned, and generated in sampling; else they are given."""


class Coordinates(NamedTuple):
    """Coordinates of slots; each field is an integer (or bool) array of the same shape as the slots."""

    frame: np.ndarray
    raster: np.ndarray
    row: np.ndarray
    column: np.ndarray
    order: np.ndarray
    causal: np.ndarray


@dataclass(frozen=True)
class ClipLayout:
    """Text of `text_len` tokens, then `frames` of frame_side x frame_side tokens each, in temporal order."""

    text_len: int
    frame_side: int
    frames: tuple[FrameSpec, ...]

    @classmethod
    def image(cls, text_len: int, frame_side: int) -> "ClipLayout":
        """One causal frame: a text-to-image transformer (CogView2's role)."""
        return cls(text_len, frame_side, (FrameSpec(order=0, causal=True, supervised=True),))

    @classmethod
    def sequential(
        cls, text_len: int, frame_side: int, num_frames: int, *, learn_first_frame: bool = False
    ) -> "ClipLayout":
        """Stage 1: frames in order. As published, the trunk generates frame 0, so it is not learned."""
        first = 0 if learn_first_frame else 1
        return cls(text_len, frame_side, tuple(FrameSpec(i, True, i >= first) for i in range(num_frames)))

    @classmethod
    def interpolation(cls, text_len: int, frame_side: int, num_frames: int) -> "ClipLayout":
        """Stage 2: even frames are given and attend to each other; odd frames are generated between them, in order."""
        if num_frames < 3 or num_frames % 2 == 0:
            raise ValueError(f"num_frames={num_frames}: interpolation needs an odd number of at least 3 frames")
        given = FrameSpec(order=0, causal=False, supervised=False)
        return cls(
            text_len,
            frame_side,
            tuple(FrameSpec((i + 1) // 2, True, True) if i % 2 else given for i in range(num_frames)),
        )

    @property
    def frame_len(self) -> int:
        """Slots per frame."""
        return self.frame_side**2

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def num_slots(self) -> int:
        """Slots of all frames, without text."""
        return self.num_frames * self.frame_len

    @property
    def supervised_frames(self) -> tuple[int, ...]:
        return tuple(i for i, frame in enumerate(self.frames) if frame.supervised)

    @property
    def given_frames(self) -> tuple[int, ...]:
        return tuple(i for i, frame in enumerate(self.frames) if not frame.supervised)

    @property
    def generation_order(self) -> tuple[int, ...]:
        """Supervised frames in generation order."""
        return tuple(sorted(self.supervised_frames, key=lambda i: self.frames[i].order))

    def slots_of(self, *frames: int) -> np.ndarray:
        """Slots of these frames, in argument order. Shape (len(frames) * frame_len,)."""
        return np.concatenate([np.arange(self.frame_len) + f * self.frame_len for f in frames])

    def locate(self, slots: np.ndarray) -> Coordinates:
        """Coordinates of slots; every field has the shape of `slots`."""
        frame, raster = slots // self.frame_len, slots % self.frame_len
        order = np.array([f.order for f in self.frames])[frame]
        causal = np.array([f.causal for f in self.frames])[frame]
        return Coordinates(frame, raster, raster // self.frame_side, raster % self.frame_side, order, causal)
