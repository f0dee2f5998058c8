"""Batches of clips that are kept as each is done, so that a run that was stopped goes on behind its last whole batch.

What is done with them (files, nothing at all) is decided by the `Keep` handed in. Cutting into batches is here, since
another cut is another rounding of the logits: a resumed run must cut as the first one did.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cogvideo.inference.engine import Progress
from cogvideo.model.transformer import CogVideoTransformer

Keep = Callable[[str, Callable[[], Tensor]], Tensor]
"""Given a batch's name and a way to make it: the batch, made and kept, or as it was kept before."""


def keep_nothing(name: str, make: Callable[[], Tensor]) -> Tensor:
    return make()


class Sampler(Protocol):
    """Fills in frames of clips: `clip_sampler.ClipSampler`, or that in kept batches."""

    @property
    def model(self) -> CogVideoTransformer: ...

    def __call__(
        self,
        known: Tensor,
        texts: Sequence[Sequence[int]],
        guide: Sequence[int] | None,
        uniforms: Tensor,
        progress: Progress | None = None,
    ) -> Tensor: ...


class KeptSampler:
    """A sampler asked for one batch at a time, each kept under a name made of `name` and its first clip's number."""

    def __init__(self, sampler: Sampler, clips_at_once: int, tokens_a_clip: int, name: str, keep: Keep) -> None:
        """`tokens_a_clip`: as many as the sampler draws, which progress is told of batches that were there already."""
        self.sampler, self.clips_at_once, self.tokens_a_clip = sampler, clips_at_once, tokens_a_clip
        self.name, self.keep = name, keep

    @property
    def model(self) -> CogVideoTransformer:
        return self.sampler.model

    def __call__(
        self,
        known: Tensor,
        texts: Sequence[Sequence[int]],
        guide: Sequence[int] | None,
        uniforms: Tensor,
        progress: Progress | None = None,
    ) -> Tensor:
        """Shapes as `clip_sampler.ClipSampler`. Raises: ValueError for a kept batch of another shape."""
        done = []
        for first in range(0, len(known), self.clips_at_once):
            some = slice(first, first + self.clips_at_once)
            made = False

            def make(some: slice = some) -> Tensor:
                nonlocal made
                made = True
                return self.sampler(known[some], texts[some], guide, uniforms[some], progress)

            name = f"{self.name}-{first:06d}"
            batch = self.keep(name, make)
            if batch.shape != known[some].shape:
                raise ValueError(f"the kept batch {name} is of shape {tuple(batch.shape)}, not of this run; remove it")
            if not made and progress is not None:
                progress(len(batch) * self.tokens_a_clip)
            done.append(batch)
        return torch.cat(done)
