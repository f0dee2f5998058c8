"""What the models are told for a list of captions: every text of the first frame, the key frames and each round.

How a single text is built is `sequence/prompt.py`; which texts a clip takes is here, and nothing is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cogvideo.model.config import ModelConfig
from cogvideo.sampling.config import STYLES, DrawConfig, SampleConfig
from cogvideo.sampling.interpolate import clip_seconds
from cogvideo.sequence.prompt import Encode, PromptFormat


@dataclass(frozen=True)
class Said:
    """What one model is told: the text of each caption, and of the guide where there is guidance."""

    texts: list[list[int]]
    guide: list[int] | None


@dataclass(frozen=True)
class Texts:
    """Every text that sampling a list of captions takes, as token ids; each list goes caption by caption."""

    first_frame: Said
    key_frames: Said
    rounds: list[Said]


@dataclass(frozen=True)
class Wording:
    """How certain models are spoken to."""

    encode: Encode
    prompt: PromptFormat
    trunk: ModelConfig | None
    """The text-to-image model that draws first frames; None: stage 1 has learned to."""
    sequential: ModelConfig
    interpolation: ModelConfig | None

    def clips(self, prompts: Sequence[str], config: SampleConfig) -> Texts:
        """Raises: ValueError for a prompt that is empty or too long, none at all, or settings that cannot be."""
        if not prompts:
            raise ValueError("there is no prompt; describe a video in a few words")
        key_frames = self._clip(self.sequential, config.key_frames, config.seconds, prompts)
        if self.trunk is not None:
            first_frame = self._picture(self.trunk, config, prompts)
        elif config.style != SampleConfig.style:
            raise ValueError(f"style={config.style}: stage 1 of these weights draws the first frame too; leave it out")
        else:
            first_frame = self._clip(self.sequential, config.first_frame, config.seconds, prompts)
        return Texts(first_frame, key_frames, self.rounds(prompts, config, self.sequential.num_frames))

    def rounds(self, prompts: Sequence[str], config: SampleConfig, num_frames: int) -> list[Said]:
        """What stage 2 is told in each round, where the first is of `num_frames` frames. Raises: as `clips`."""
        if not config.rounds:
            return []
        if self.interpolation is None:
            raise ValueError(f"these weights have no stage 2 for rounds={config.rounds} of interpolation; set rounds=0")
        said = []
        for done in range(config.rounds):
            count = (num_frames - 1) * 2**done + 1
            seconds = clip_seconds(self.interpolation.layout, count, config.seconds)
            # three digits are as many as a text about a clip's length may have
            said.append(self._clip(self.interpolation, config.interpolation, float(f"{seconds:.3g}"), prompts))
        return said

    def _picture(self, model: ModelConfig, config: SampleConfig, prompts: Sequence[str]) -> Said:
        suffix = STYLES[config.style]
        wording = self.prompt if suffix is None else replace(self.prompt, image_suffix=suffix)

        def say(caption: str) -> list[int]:
            return wording.image_text(self.encode, caption, model.text_len)

        guided = config.first_frame.guidance_scale is not None
        return Said([say(prompt) for prompt in prompts], say(wording.unconditional) if guided else None)

    def _clip(self, model: ModelConfig, draw: DrawConfig, seconds: float, prompts: Sequence[str]) -> Said:
        newline, text_len = model.vocabulary.newline, model.text_len
        suffix = self.prompt.video_suffix if draw.says_video else ""
        texts = [
            self.prompt.clip_text(self.encode, newline, seconds, prompt, text_len, suffix=suffix) for prompt in prompts
        ]
        if draw.guidance_scale is None:
            return Said(texts, None)
        return Said(texts, self.prompt.unconditional_text(self.encode, newline, seconds, text_len))
