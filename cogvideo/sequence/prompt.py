"""Prompt text: the token ids of a clip's length and caption. Not a tokenizer: functions take a tokenizer's `encode`.

The clip length in seconds, which its frames span, is the frame-rate token of the paper (2205.15868, section 3.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cogvideo.text import normalise

Encode = Callable[[str], list[int]]

NO_LIMIT = 1 << 30
"""As `text_len`, allows prompts of any length: training cuts long texts, while sampling refuses them."""


@dataclass(frozen=True)
class PromptFormat:
    """The words around a caption. Training and sampling must agree on them, so they are saved with the weights."""

    seconds_unit: str = "秒"
    """Follows the clip length: "4.0秒"."""
    image_suffix: str = " 高清摄影"
    """Appended to the caption of a single image (the first frame)."""
    video_suffix: str = " 视频"
    """Appended to the caption of video frames drawn with guidance."""
    unconditional: str = "视频"
    """The caption of the unconditional branch of guidance: "video"."""

    def image_text(self, encode: Encode, caption: str, text_len: int) -> list[int]:
        """Text ids for one image. Raises: ValueError if there are more than text_len."""
        return _check_length(encode(normalise(caption) + self.image_suffix), caption, text_len)

    def clip_text(
        self, encode: Encode, newline: int, seconds: float, caption: str, text_len: int, *, suffix: str = ""
    ) -> list[int]:
        """Text ids for a clip of `seconds`: length, line break, caption. Raises: ValueError if there are too many."""
        length = encode(f"{float(seconds)}{self.seconds_unit}")
        return _check_length([*length, newline, *encode(normalise(caption) + suffix)], caption, text_len)

    def unconditional_text(self, encode: Encode, newline: int, seconds: float, text_len: int) -> list[int]:
        """Text ids for guidance's unconditional branch: the clip length, but no caption of its own."""
        return self.clip_text(encode, newline, seconds, self.unconditional, text_len)


def seconds_as_given(stored: np.float32 | float) -> float:
    """A clip length stored as float32, as it was given: the shortest decimal that rounds to the same float32."""
    return float(str(np.float32(stored)))


def left_pad(texts: Sequence[Sequence[int]], text_len: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-align texts of unequal length.

    Returns ids (batch, text_len) int64 and a mask (batch, text_len) bool that is False on padding. Padding is masked
    and positions count from the first real token, so the amount of padding never changes a result.
    """
    ids = np.full((len(texts), text_len), pad, dtype=np.int64)
    for row, text in zip(ids, texts, strict=True):
        if not 0 < len(text) <= text_len:
            raise ValueError(f"text has {len(text)} tokens, expected 1 to {text_len}; shorten the prompt")
        row[text_len - len(text) :] = text
    mask = np.arange(text_len) >= text_len - np.array([len(t) for t in texts])[:, None]
    return ids, mask


def _check_length(ids: list[int], caption: str, text_len: int) -> list[int]:
    if not normalise(caption):
        raise ValueError("the prompt is empty; describe the video in a few words")
    if len(ids) > text_len:
        shown = caption if len(caption) <= 40 else caption[:40] + "..."
        raise ValueError(
            f"prompt {shown!r} takes {len(ids)} text tokens with its clip length, the model reads at most {text_len}; "
            "shorten it"
        )
    return ids
