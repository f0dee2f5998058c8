"""Batches of clips. A batch is one call of the engine and one file of a resumable run; nothing else cuts it further.

Where batches are cut affects rounding in the logits, so a resumed run must cut them as the first run did.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cogvideo.inference.engine import Conditioning, Engine, Program, Progress
from cogvideo.inference.sampler import TokenSampler
from cogvideo.sampling.config import DrawConfig
from cogvideo.sampling.prompts import EncodedPrompt


class StageOutput(NamedTuple):
    """Clips after one stage of generation."""

    tokens: Tensor
    """(clips, frames so far, frame_len) int64."""
    fps: float


class BatchCache(Protocol):
    """Keeps finished batches, so that a resumed run does not draw them again."""

    def load(self, name: str) -> Tensor | None:
        """The batch stored under this name; None if there is none."""
        ...

    def store(self, name: str, tokens: Tensor) -> None: ...


@dataclass(frozen=True)
class FrameSampler:
    """A model set up to draw certain frames of its clips; every stage of generation is one."""

    engine: Engine
    program: Program
    token_sampler: TokenSampler
    """On the engine's device, like the program."""
    config: DrawConfig

    def sample(
        self,
        known: Tensor,
        prompts: Sequence[EncodedPrompt],
        uniforms: Tensor,
        *,
        clips_at_once: int,
        name: str = "",
        cache: BatchCache | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw the program's frames for any number of clips, `clips_at_once` of them in a batch.

        Shapes: known (clips, frames, frame_len) int64, valid at given frames; uniforms (clips, frames, frame_len, 2);
        returns (clips, frames, frame_len). Input and output are on the CPU. `prompts`: one per clip.
        `cache` holds batches under `name` and the index of their first clip. `progress` receives the number of tokens
        just drawn, or loaded from the cache.
        Raises: ValueError for a cached batch of another shape.
        """
        scale = self.config.guidance_scale
        batches = []
        for first in range(0, len(known), clips_at_once):
            part = slice(first, first + clips_at_once)
            batch_name = f"{name}-{first:06d}"
            batch = None if cache is None else cache.load(batch_name)
            if batch is not None:
                if batch.shape != known[part].shape:
                    raise ValueError(
                        f"the cached batch {batch_name} has shape {tuple(batch.shape)}, expected "
                        f"{tuple(known[part].shape)}; remove it"
                    )
                if progress is not None:
                    progress(len(batch) * self.program.tokens_per_clip)
            else:
                conditioning = Conditioning.from_tokens(
                    [prompt.text for prompt in prompts[part]],
                    [] if scale is None else [prompt.guide or [] for prompt in prompts[part]],
                    self.engine.model.config.vocabulary.pad,
                    guidance_scale=scale,
                    text_bonus=self.config.effective_text_bonus,
                )
                tokens = self.engine.generate(
                    self.program,
                    known[part].flatten(1),
                    conditioning,
                    self.token_sampler,
                    uniforms[part].flatten(1, 2),
                    progress,
                )
                batch = tokens.view_as(known[part])
                if cache is not None:
                    cache.store(batch_name, batch)
            batches.append(batch)
        return torch.cat(batches)
