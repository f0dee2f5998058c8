"""One model set to generate certain frames of a clip: what both stages are made of. Any number of clips, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideo.inference.batching import Together
from cogvideo.inference.engine import Conditioning, Program, Progress, generate
from cogvideo.inference.sampler import Draw
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sampling.config import DrawConfig


@dataclass(frozen=True)
class ClipSampler:
    model: CogVideoTransformer
    program: Program
    draw: Draw
    """Like the program, on the model's device."""
    config: DrawConfig
    clips_at_once: int
    together: Together | None = None
    """Where other threads decode with the model too."""

    def __call__(
        self,
        known: Tensor,
        texts: Sequence[Sequence[int]],
        guide: Sequence[int] | None,
        uniforms: Tensor,
        progress: Progress | None = None,
    ) -> Tensor:
        """Fill in the frames that the program generates, on the model's device; what comes in and out is on the CPU.

        Shapes: known (clips, frames, frame_len) int64, true for given frames; uniforms (clips, frames, frame_len, 2)
        -> (clips, frames, frame_len). `texts`: token ids of each clip; `guide`: of any clip, used only with guidance.
        """
        guided = self.config.guidance_scale is not None
        assert guide is not None or not guided
        device, done = self.model.final_layernorm.weight.device, []
        for first in range(0, len(known), self.clips_at_once):
            some = slice(first, first + self.clips_at_once)
            own = texts[some]
            conditioning = Conditioning.of(
                own,
                [guide] * len(own) if guided and guide is not None else [],
                self.model.config.vocabulary.pad,
                guidance_scale=self.config.guidance_scale,
                text_bonus=self.config.bonus,
            )
            made = generate(
                self.model,
                self.program,
                known[some].flatten(1).to(device),
                conditioning.to(device),
                self.draw,
                uniforms[some].flatten(1, 2).to(device),
                progress,
                self.together,
            )
            done.append(made.cpu())
        return torch.cat(done).view(known.shape)
