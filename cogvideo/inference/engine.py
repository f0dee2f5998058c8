"""Decoding: a schedule of slots, run step by step over an explicit cache. Knows no stage, no text and no picture.

    program = compile_program(model.config, sequential(layout, given=(0,), frames=(1, 2, 3, 4)))     # once
    tokens = generate(model, program, known, conditioning, draw, uniforms)                           # for each batch

Guidance doubles the batch: conditional rows first, their guides behind them, one forward for both.
"""

from collections.abc import Callable, Generator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cogvideo.inference.batching import Decoding, Together
from cogvideo.inference.cache import KVCache
from cogvideo.inference.sampler import Draw
from cogvideo.inference.schedules import Schedule, spatial_places
from cogvideo.model.config import ModelConfig
from cogvideo.model.plan import Plan, plan_forward
from cogvideo.model.sight import Sights
from cogvideo.model.transformer import CogVideoTransformer, Step, TextBias
from cogvideo.sequence.prompt import left_pad

Progress = Callable[[int], object]
"""Told how many tokens were just drawn."""
PREFILL_SLOTS = 2048
"""Of all clips that a prefill's forward holds; one clip at least."""


@dataclass(frozen=True)
class Feed:
    """One forward: which tokens it will give, and where its inputs lie."""

    slots: Tensor
    """(rows,) int64."""
    source: Tensor
    """(rows,) columns of the input row: 0 for BOI, 1 + slot of the left neighbour otherwise."""

    @classmethod
    def of(cls, slots: np.ndarray, frame_len: int) -> "Feed":
        slots = slots.astype(np.int64)
        return cls(torch.from_numpy(slots), torch.from_numpy(np.where(slots % frame_len, slots, 0)))

    def to(self, device: torch.device) -> "Feed":
        return Feed(self.slots.to(device), self.source.to(device))


@dataclass(frozen=True)
class Program:
    """A schedule made ready for a model of one configuration; it holds no weights and no state."""

    given: tuple[Feed, Plan] | None
    """The forward of given frames, and what it attends to."""
    sights: Sights
    """What all others attend to."""
    steps: tuple[Feed, ...]
    """Empty where tokens are guessed."""
    guesses: "Guesses | None"
    temporal: bool
    spatial_places: int
    temporal_places: int
    """What the cache must have room for in each channel."""

    @property
    def tokens_drawn(self) -> int:
        """A clip."""
        return len(self.guesses) if self.guesses else sum(len(step.slots) for step in self.steps)

    def to(self, device: torch.device) -> "Program":
        """For a model that is there."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            given=self.given and (self.given[0].to(device), self.given[1].to(device)),
            sights=self.sights.to(device),
            steps=tuple(step.to(device) for step in self.steps),
            guesses=self.guesses and self.guesses.to(device),
        )


class Guesses:
    """Windows of a clip's slots: decoding decides where they begin."""

    def __init__(self, schedule: Schedule, frame_len: int) -> None:
        assert schedule.draft is not None
        order = np.concatenate(schedule.steps)
        self.feed = Feed.of(order, frame_len)
        """Of all slots in their order."""
        self.source = torch.from_numpy(schedule.draft.source[order])
        """(slots,) whose token is the first guess."""
        self.window = schedule.draft.window

    @property
    def slots(self) -> Tensor:
        return self.feed.slots

    def __len__(self) -> int:
        return len(self.slots)

    def from_(self, start: int) -> Feed:
        """The window that begins with the start-th slot."""
        window = slice(start, start + self.window)
        return Feed(self.feed.slots[window], self.feed.source[window])

    def to(self, device: torch.device) -> "Guesses":
        moved = copy(self)
        moved.feed, moved.source = self.feed.to(device), self.source.to(device)
        return moved


def compile_program(
    config: ModelConfig,
    schedule: Schedule,
    *,
    temporal: bool = True,
    given_windows: Literal["cut", "wrapped"] = "cut",
) -> Program:
    """Make a schedule ready. `temporal=False` runs the trunk alone, a text-to-image model of its frame."""
    places, frame_len = spatial_places(schedule, config.layout), config.frame_len
    sights = Sights.of(config, temporal=temporal, given_windows=given_windows, spatial_places=places)
    given = None
    if len(schedule.given):
        plan = plan_forward(
            config, schedule.given, temporal=temporal, given_windows=given_windows, spatial_places=places
        )
        given = Feed.of(schedule.given, frame_len), plan
    touched = np.concatenate([schedule.given, *schedule.steps])
    assert len(np.unique(touched)) == len(touched), "a schedule names a slot twice"
    return Program(
        given,
        sights,
        () if schedule.draft else tuple(Feed.of(step, frame_len) for step in schedule.steps),
        Guesses(schedule, frame_len) if schedule.draft else None,
        temporal,
        int(places.max()) + 1,
        int(touched.max()) + 1,
    )


@dataclass(frozen=True)
class Conditioning:
    """What steers a batch of clips: their texts, and how strongly."""

    text: Tensor
    """(rows, text_len) int64 padded on the left; rows = clips, or twice that with guidance: the guides come last."""
    text_mask: Tensor
    """(rows, text_len) bool, False on padding."""
    guidance_scale: float | None = None
    """Logits become guide + scale * (conditional - guide); None: no guide."""
    text_bonus: float = 0.0
    """Added to the scores of text keys ("attention upweighting"), see `prefill`; guides have none, as published."""

    @property
    def bonus_of_rows(self) -> Tensor:
        """(rows, 1), zero for the guides."""
        bonus = torch.full((len(self.text), 1), self.text_bonus, device=self.text.device)
        if self.guidance_scale is not None:
            bonus[len(bonus) // 2 :] = 0.0
        return bonus

    def to(self, device: torch.device) -> "Conditioning":
        return replace(self, text=self.text.to(device), text_mask=self.text_mask.to(device))

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[int]],
        guides: Sequence[Sequence[int]],
        pad: int,
        *,
        guidance_scale: float | None,
        text_bonus: float,
    ) -> "Conditioning":
        """From token ids. `guides`: as many as `texts`, or none without guidance. Padded to the longest."""
        assert len(guides) == (len(texts) if guidance_scale is not None else 0)
        rows = [*texts, *guides]
        text, mask = left_pad(rows, max(map(len, rows)), pad)
        return cls(torch.from_numpy(text), torch.from_numpy(mask), guidance_scale, text_bonus)


@torch.inference_mode()
def generate(
    model: CogVideoTransformer,
    program: Program,
    known: Tensor,
    conditioning: Conditioning,
    draw: Draw,
    uniforms: Tensor,
    progress: Progress | None = None,
    together: Together | None = None,
) -> Tensor:
    """Draw every token of the program's steps, for a batch of clips at once.

    Shapes: known (clips, num_slots) int64, true at the given slots, anything elsewhere; uniforms (clips, num_slots, 2)
    -> (clips, num_slots), filled in. num_slots: the clip's, or as many as the program needs. `together`: the model's
    meeting place, where other threads decode with it too.
    """
    assert not model.training, "dropout is on; call model.eval() first"
    boi = torch.full_like(known[:, :1], model.config.vocabulary.start_of_image)
    cache = KVCache.allocate(
        model.config,
        batch=len(conditioning.text),
        text_len=conditioning.text.shape[1],
        temporal=program.temporal,
        spatial_places=program.spatial_places,
        temporal_places=program.temporal_places,
        dtype=cache_dtype(model),
        device=known.device,
    )
    together = together or Together(model)
    clips = Clips(program, torch.cat([boi, known], dim=1), conditioning, cache, draw, uniforms, progress, together)
    clips.prefill()
    together.run(clips.decode() if program.guesses is None else clips.decode_guessing(program.guesses))
    return clips.tokens[:, 1:]


def cache_dtype(model: CogVideoTransformer) -> torch.dtype:
    """As the activations are; half of float32 where the weights are narrower than that, as reading is what costs."""
    activations = model.final_layernorm.weight.dtype
    narrow = activations == torch.float32 != model.word_embeddings.weight.dtype
    return torch.float16 if narrow else activations


@dataclass
class Clips:
    """A batch of clips being decoded."""

    program: Program
    tokens: Tensor
    """(clips, 1 + num_slots) int64: BOI, then what is known or drawn so far."""
    conditioning: Conditioning
    cache: KVCache
    draw: Draw
    uniforms: Tensor
    progress: Progress | None
    together: Together

    def __post_init__(self) -> None:
        bonus = self.conditioning.bonus_of_rows
        self._bias = TextBias.of(self.conditioning.text_mask, bonus, bonus)

    def prefill(self) -> None:
        """Fill the cache with text and given frames; without given frames do nothing: the first step brings the text.

        The text bonus reaches given frames in the spatial channel only: published inference, which its settings were
        tuned with.
        """
        if self.program.given is None:
            return
        given, plan = self.program.given
        rows, inputs = self.conditioning.text, self._inputs(given)
        # some clips at a time: activations of all would be the peak of sampling's memory
        at_once = max(1, PREFILL_SLOTS // inputs.shape[1])
        bias = TextBias.of(self.conditioning.text_mask, self.conditioning.bonus_of_rows, 0.0)
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            some = TextBias(bias.spatial[part], bias.temporal[part])
            self.together.model(inputs[part], plan, some, text=rows[part], cache=self.cache.clips(part))

    def decode(self) -> Decoding:
        """Run the steps."""
        for number, step in enumerate(self.program.steps):
            logits = yield from self._logits(step, first=number == 0)
            drawn = self.draw(logits, self.uniforms.index_select(1, step.slots))
            self.tokens.index_copy_(1, step.slots + 1, drawn)
            if self.progress is not None:
                self.progress(drawn.numel())

    def decode_guessing(self, guesses: Guesses) -> Decoding:
        """As `decode`, with the same tokens, by checking guesses; why that is exact: speculative.py.

        What a slot leaves in the cache is right once its token is: both came from the same, right, inputs.
        """
        tokens = self.tokens
        sure = torch.zeros_like(tokens[:, 0])
        """Slots of each clip whose tokens are right, in the order of decoding."""
        start, guessed = 0, 0
        while start < len(guesses):
            window = guesses.from_(start)
            fresh = slice(guessed, start + len(window.slots))
            tokens[:, guesses.slots[fresh] + 1] = tokens[:, guesses.source[fresh] + 1]
            guessed = max(guessed, start + len(window.slots))

            logits = yield from self._logits(window, first=start == 0)
            drawn = self.draw(logits, self.uniforms.index_select(1, window.slots))
            guess = tokens.index_select(1, window.slots + 1)
            known = torch.arange(start, guessed, device=tokens.device) < sure[:, None]
            right = (known | (drawn == guess)).cumprod(1).sum(1)
            tokens.index_copy_(1, window.slots + 1, torch.where(known, guess, drawn))
            before, sure = sure, torch.maximum(sure, (start + right + 1).clamp(max=guessed))
            start = int(sure.min())
            if self.progress is not None:
                self.progress(int((sure - before).sum()))

    def _logits(self, forward: Feed, *, first: bool) -> Generator[Step, Tensor, Tensor]:
        """Scores of a forward's slots, guided: (clips, slots, image tokens)."""
        inputs, model, sights = self._inputs(forward), self.together.model, self.program.sights
        if first and self.program.given is None:
            text, plan = self.conditioning.text, sights.plan(forward.slots)
            logits = model.logits(model(inputs, plan, self._bias, text=text, cache=self.cache))
        else:
            logits = yield Step(inputs, forward.slots, sights, self._bias, self.cache)
        return guided(logits, self.conditioning.guidance_scale)

    def _inputs(self, forward: Feed) -> Tensor:
        """The tokens that a forward is fed: (rows, slots), guides behind the clips."""
        inputs = self.tokens.index_select(1, forward.source)
        return inputs if self.conditioning.guidance_scale is None else inputs.repeat(2, 1)


def guided(logits: Tensor, scale: float | None) -> Tensor:
    """Classifier-free guidance: (2 * clips, ...) -> (clips, ...), or as they are without a scale."""
    if scale is None:
        return logits
    conditional, guide = rearrange(logits, "(two clips) ... -> two clips ...", two=2)
    return torch.lerp(guide, conditional, scale)
