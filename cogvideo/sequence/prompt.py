"""Prompt text: how a clip's length and its caption become the text rows. Not a tokenizer: it is handed one.

The length of the clip in seconds is the frame-rate token of the paper (2205.15868, section 3.1): five frames span it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class PromptFormat:
    """The published wording; training and sampling must agree on it, so it travels with the weights."""

    seconds_unit: str = "秒"
    """Written behind the clip length: "4.0秒"."""
    image_suffix: str = " 高清摄影"
    """Appended for a single picture (the first frame)."""
    video_suffix: str = " 视频"
    """Appended for frames of a video when guided."""
    unconditional: str = "视频"
    """Stands for "any video": the guide's caption."""

    def image_text(self, encode: Encode, caption: str, text_len: int) -> list[int]:
        """Text ids for one picture, at most text_len of them."""
        return _checked(encode(_one_line(caption) + self.image_suffix), caption, text_len)

    def clip_text(
        self, encode: Encode, newline: int, seconds: float, caption: str, text_len: int, *, suffix: str = ""
    ) -> list[int]:
        """Text ids for a clip that spans `seconds`: length, line break, caption. Raises ValueError if too long."""
        length = encode(f"{float(seconds)}{self.seconds_unit}")
        return _checked([*length, newline, *encode(_one_line(caption) + suffix)], caption, text_len)

    def unconditional_text(self, encode: Encode, newline: int, seconds: float, text_len: int) -> list[int]:
        """Text ids of the guide: the same length, no caption."""
        return self.clip_text(encode, newline, seconds, self.unconditional, text_len)


def left_pad(texts: Sequence[Sequence[int]], text_len: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-align texts of unequal length.

    Returns ids (batch, text_len) int64 and a mask (batch, text_len) bool that is False on padding. Padding is masked
    and positions count from the first real token, so the number of pads never changes a result.
    """
    ids = np.full((len(texts), text_len), pad, dtype=np.int64)
    for row, text in zip(ids, texts, strict=True):
        if not 0 < len(text) <= text_len:
            raise ValueError(f"text has {len(text)} tokens, expected 1 to {text_len}; shorten the prompt")
        row[text_len - len(text) :] = text
    mask = np.arange(text_len) >= text_len - np.array([len(t) for t in texts])[:, None]
    return ids, mask


def _one_line(caption: str) -> str:
    return " ".join(caption.split())


def _checked(ids: list[int], caption: str, text_len: int) -> list[int]:
    if not caption.strip():
        raise ValueError("the prompt is empty; describe the video in a few words")
    if len(ids) > text_len:
        shown = caption if len(caption) <= 40 else caption[:40] + "..."
        raise ValueError(
            f"prompt {shown!r} takes {len(ids)} text tokens with its clip length, the model reads at most {text_len}; "
            "shorten it"
        )
    return ids
