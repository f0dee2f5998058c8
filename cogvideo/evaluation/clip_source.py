"""Clips to be scored, by number: from published training rows, or from a prepared folder with its captions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cogvideo.data.dataset import ClipDataset
from cogvideo.data.loader import UNCUT
from cogvideo.data.published_rows import PublishedRows
from cogvideo.model.config import ModelConfig
from cogvideo.sequence.batch import Batch
from cogvideo.sequence.prompt import PromptFormat, left_pad
from cogvideo.tokenizers.text import open_text_tokenizer


@dataclass(frozen=True)
class ClipSource:
    """`count` clips, and how to get some of them."""

    count: int
    batch: Callable[[range], Batch]


def published_rows(path: Path, config: ModelConfig) -> ClipSource:
    """Raises: OSError; ValueError if the file is not a whole number of rows of the model's sizes."""
    rows = PublishedRows(
        path,
        text_len=config.text_len,
        num_frames=config.num_frames,
        frame_len=config.frame_len,
        vocabulary=config.vocabulary,
    )
    return ClipSource(len(rows), lambda which: rows.batch(np.array(which)))


def prepared_clips(
    path: Path, config: ModelConfig, text_tokenizer: Path, prompt: PromptFormat, *, suffix: bool = False
) -> ClipSource:
    """A folder that `cogvideo prepare` made. `suffix`: word captions as guided sampling does.

    Raises: OSError; ValueError if the clips, the tokenizer and the model do not go together.
    """
    tokenizer, clips = open_text_tokenizer(text_tokenizer), ClipDataset(path)
    if tokenizer.vocabulary != config.vocabulary:
        raise ValueError(f"{text_tokenizer} has other ids than the model was trained with; give the model's own")
    if (clips.num_frames, clips.frame_len) != (config.num_frames, config.frame_len):
        raise ValueError(
            f"{path} holds clips of {clips.num_frames} frames of {clips.frame_len} tokens, the model reads "
            f"{config.num_frames} of {config.frame_len}"
        )
    if clips.num_tokens > config.vocabulary.num_image_tokens:
        raise ValueError(
            f"{path} holds tokens of an image tokenizer of {clips.num_tokens} codes, the model knows "
            f"{config.vocabulary.num_image_tokens}; prepare it with the model's own"
        )
    newline, pad, text_len = config.vocabulary.newline, config.vocabulary.pad, config.text_len
    ending = prompt.video_suffix if suffix else ""

    def batch(which: range) -> Batch:
        lengths_and_captions = clips.texts(np.array(which))
        texts = [  # long ones are cut, as in training
            prompt.clip_text(tokenizer.encode, newline, seconds, caption, UNCUT, suffix=ending)[:text_len]
            for seconds, caption in lengths_and_captions
        ]
        text, mask = (torch.from_numpy(a) for a in left_pad(texts, text_len, pad))
        seconds = torch.tensor([seconds for seconds, _ in lengths_and_captions])
        return Batch(text, mask, torch.from_numpy(clips.frames(np.array(which))), seconds)

    return ClipSource(len(clips), batch)
