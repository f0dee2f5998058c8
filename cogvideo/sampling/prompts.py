"""Captions encoded for every model that reads them: for the first frame, the key frames and each round.

The prompt format itself is in `sequence/prompt.py`. All prompts of a job are encoded here once, before anything is
drawn; this also checks them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cogvideo.model.config import ModelConfig
from cogvideo.rng import SampleKey, sample_keys
from cogvideo.sampling.config import STYLES, DrawConfig, SampleConfig
from cogvideo.sequence.layout import ClipLayout
from cogvideo.sequence.prompt import Encode, PromptFormat
from cogvideo.text import clean_text


@dataclass(frozen=True)
class EncodedPrompt:
    """One caption as one model reads it: token ids."""

    text: list[int]
    guide: list[int] | None
    """The unconditional text for classifier-free guidance; None without guidance."""


@dataclass(frozen=True)
class ClipPrompts:
    """One caption as all models of a clip read it."""

    first_frame: EncodedPrompt
    key_frames: EncodedPrompt
    rounds: list[EncodedPrompt]
    """One per round of interpolation."""


@dataclass(frozen=True)
class PromptBuilder:
    """Encodes captions for a given set of models."""

    encode: Encode
    prompt_format: PromptFormat
    trunk: ModelConfig | None
    """The text-to-image model that draws first frames; None: stage 1 draws them itself."""
    sequential: ModelConfig
    interpolation: ModelConfig | None

    def encode_clips(self, captions: Sequence[str], config: SampleConfig) -> list[ClipPrompts]:
        """Encode each caption for a whole clip.

        Raises: ValueError for a caption that is empty or too long, no caption at all, or settings that these models
        do not support.
        """
        if not captions:
            raise ValueError("there is no prompt; describe a video in a few words")
        key_frames = self._encode_clip_texts(self.sequential, config.key_frames, config.seconds, captions)
        if self.trunk is not None:
            first_frames = self._encode_image_texts(self.trunk, config, captions)
        elif config.style != SampleConfig.style:
            raise ValueError(
                f"style={config.style} needs a text-to-image trunk, but stage 1 of these weights draws the first "
                "frame; leave it out"
            )
        else:
            first_frames = self._encode_clip_texts(self.sequential, config.first_frame, config.seconds, captions)
        rounds = self.encode_rounds(captions, config, self.sequential.num_frames)
        return [ClipPrompts(*prompts) for prompts in zip(first_frames, key_frames, rounds, strict=True)]

    def encode_rounds(
        self, captions: Sequence[str], config: SampleConfig, num_frames: int
    ) -> list[list[EncodedPrompt]]:
        """Encode each caption for each round of interpolation, where the first round starts from `num_frames` frames.

        Returns one list per caption. Raises: as `encode_clips`.
        """
        if not config.rounds:
            return [[] for _ in captions]
        model = self.interpolation
        if model is None:
            raise ValueError(f"these weights have no stage 2 for rounds={config.rounds} of interpolation; set rounds=0")
        rounds = []
        for done in range(config.rounds):
            seconds = model_clip_seconds(model.layout, (num_frames - 1) * 2**done + 1, config.seconds)
            rounds.append(self._encode_clip_texts(model, config.interpolation, _written_seconds(seconds), captions))
        return [list(prompts) for prompts in zip(*rounds, strict=True)]

    def _encode_image_texts(
        self, model: ModelConfig, config: SampleConfig, captions: Sequence[str]
    ) -> list[EncodedPrompt]:
        suffix = STYLES[config.style]
        format = self.prompt_format if suffix is None else replace(self.prompt_format, image_suffix=suffix)
        guide = None
        if config.first_frame.guidance_scale is not None:
            guide = format.image_text(self.encode, format.unconditional, model.text_len)
        texts = {
            caption: format.image_text(self.encode, caption, model.text_len) for caption in dict.fromkeys(captions)
        }
        return [EncodedPrompt(texts[caption], guide) for caption in captions]

    def _encode_clip_texts(
        self, model: ModelConfig, draw: DrawConfig, seconds: float, captions: Sequence[str]
    ) -> list[EncodedPrompt]:
        format, newline, text_len = self.prompt_format, model.vocabulary.newline, model.text_len
        suffix = format.video_suffix if draw.appends_video_suffix else ""
        texts = {
            caption: format.clip_text(self.encode, newline, seconds, caption, text_len, suffix=suffix)
            for caption in dict.fromkeys(captions)
        }
        guide = None
        if draw.guidance_scale is not None:
            guide = format.unconditional_text(self.encode, newline, seconds, text_len)
        return [EncodedPrompt(texts[caption], guide) for caption in captions]


def prompt_keys(
    seed: int, prompts: Sequence[str], samples_per_prompt: int = 1, seen: dict[str, int] | None = None
) -> list[SampleKey]:
    """`sample_keys` for prompts as the user gave them, which are checked and normalised (`cogvideo.text`).

    Raises: ValueError as `clean_text`.
    """
    return sample_keys(seed, [clean_text(prompt) for prompt in prompts], samples_per_prompt, seen)


def model_clip_seconds(layout: ClipLayout, num_frames: int, seconds: float) -> float:
    """Length in seconds of each of stage 2's clips when it interpolates `num_frames` frames that span `seconds`."""
    return seconds * (len(layout.given_frames) - 1) / (num_frames - 1)


def _written_seconds(seconds: float) -> float:
    """A length of up to six digits, as in training; a longer, measured one, such as 1/3 second, is rounded to three."""
    exact = float(f"{seconds:.6g}")
    return exact if math.isclose(exact, seconds, rel_tol=1e-12) else float(f"{seconds:.3g}")
