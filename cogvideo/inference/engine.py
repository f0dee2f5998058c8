"""The engine: runs a model over a schedule of slots with a cache. It knows no stage, no captions and no pixels.

    program = build_program(model.config, sequential(layout, given=(0,), frames=(1, 2, 3, 4)))      # once
    engine = Engine(model)                                                                          # once per model
    tokens = engine.generate(program.to(engine.device), known, conditioning, sampler, uniforms)     # for each batch

Classifier-free guidance doubles the batch: conditional rows first, then their guides, one forward pass for both.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvideo.inference.backends import KVCache, open_backend
from cogvideo.inference.batching import BatchScheduler, Decoding
from cogvideo.inference.sampler import TokenSampler
from cogvideo.inference.schedules import Schedule, check_schedule, spatial_cache_positions
from cogvideo.model.config import ModelConfig
from cogvideo.model.inputs import DecodeInputs, TextBias
from cogvideo.model.masks import channel_masks
from cogvideo.model.plan import DecodeMasks, GivenWindows, Plan, plan_forward
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.prompt import left_pad

Progress = Callable[[int], object]
"""Called with the number of tokens just sampled."""
PREFILL_SLOTS = 2048
"""Prefill at most this many slots of all clips in one forward pass, but always at least one clip."""


@dataclass(frozen=True)
class StepInputs:
    """One forward pass: the slots whose tokens it predicts, and where its input tokens are."""

    slots: Tensor
    """(rows,) int64."""
    input_columns: Tensor
    """(rows,) columns of `ClipState.tokens`: 0 for BOI, else 1 + the slot of the left neighbour."""

    @classmethod
    def from_slots(cls, slots: np.ndarray, frame_len: int) -> "StepInputs":
        slots = slots.astype(np.int64)
        # the left neighbour of slot s is s - 1, in column s; the first slot of each frame takes BOI
        return cls(torch.from_numpy(slots), torch.from_numpy(np.where(slots % frame_len, slots, 0)))

    def to(self, device: torch.device) -> "StepInputs":
        return StepInputs(self.slots.to(device), self.input_columns.to(device))


@dataclass(frozen=True)
class DraftPlan:
    """The slots of speculative decoding in their order; decoding decides where each window of them begins."""

    inputs: StepInputs
    guess_from: Tensor
    """(slots,) the slot whose token is the first guess for each; -1: none."""
    window: int

    @property
    def num_slots(self) -> int:
        return len(self.guess_from)

    def window_from(self, start: int) -> StepInputs:
        """The window that begins with the start-th slot."""
        window = slice(start, start + self.window)
        return StepInputs(self.inputs.slots[window], self.inputs.input_columns[window])

    def to(self, device: torch.device) -> "DraftPlan":
        return DraftPlan(self.inputs.to(device), self.guess_from.to(device), self.window)


@dataclass(frozen=True)
class Program:
    """A schedule prepared for models of one configuration; it holds no weights and no state."""

    given: tuple[StepInputs, Plan] | None
    """The forward pass over given frames."""
    masks: DecodeMasks
    """What decoding steps attend to."""
    steps: tuple[StepInputs, ...]
    """Empty for speculative decoding."""
    draft: DraftPlan | None
    temporal: bool
    spatial_capacity: int
    temporal_capacity: int
    """Frame slots that each channel's cache must have room for."""

    @property
    def tokens_per_clip(self) -> int:
        """Tokens that are sampled for each clip."""
        return self.draft.num_slots if self.draft else sum(len(step.slots) for step in self.steps)

    def to(self, device: torch.device) -> "Program":
        if device.type == "cpu":
            return self
        return replace(
            self,
            given=self.given and (self.given[0].to(device), self.given[1].to(device)),
            masks=self.masks.to(device),
            steps=tuple(step.to(device) for step in self.steps),
            draft=self.draft and self.draft.to(device),
        )


def build_program(
    config: ModelConfig,
    schedule: Schedule,
    *,
    temporal: bool = True,
    given_windows: GivenWindows = "cut",
    joined: bool = False,
) -> Program:
    """Prepare a schedule. `temporal=False` runs the trunk alone, a text-to-image model of its frame. `joined`: plan the
    pass over given frames for models whose attention computes that, see `CogVideoTransformer.is_joined`.

    Raises: ValueError if the schedule breaks a rule of `check_schedule`.
    """
    spatial_mask, by_layer = channel_masks(config.layout, config.window_size, wrap_given=given_windows == "wrapped")
    use_temporal = temporal and config.has_temporal_channel
    check_schedule(schedule, config.layout, (spatial_mask, *(by_layer if use_temporal else ())))
    positions, frame_len = spatial_cache_positions(schedule, config.layout), config.frame_len
    masks = DecodeMasks.from_config(config, temporal=temporal, given_windows=given_windows, spatial_positions=positions)
    given = None
    if len(schedule.given):
        plan = plan_forward(
            config,
            schedule.given,
            temporal=temporal,
            given_windows=given_windows,
            spatial_positions=positions,
            joined=joined,
        )
        given = StepInputs.from_slots(schedule.given, frame_len), plan
    steps: tuple[StepInputs, ...] = ()
    draft = None
    if schedule.draft is None:
        steps = tuple(StepInputs.from_slots(step, frame_len) for step in schedule.steps)
    else:
        inputs = StepInputs.from_slots(schedule.order, frame_len)
        draft = DraftPlan(inputs, torch.from_numpy(schedule.draft.source[schedule.order]), schedule.draft.window)
    last_slot = max(schedule.given.max(initial=-1), schedule.order.max(initial=-1))
    return Program(given, masks, steps, draft, temporal, int(positions.max()) + 1, int(last_slot) + 1)


@dataclass(frozen=True)
class Conditioning:
    """What steers a batch of clips: their texts, and how strongly."""

    text: Tensor
    """(rows, text_len) int64 padded on the left; rows = clips, or twice that with guidance: guides come last."""
    text_mask: Tensor
    """(rows, text_len) bool, False on padding."""
    guidance_scale: float | None = None
    """Logits become guide + scale * (conditional - guide); None: no guidance."""
    text_bonus: float = 0.0
    """Added to scores of text keys ("attention upweighting"), not for guides, as published; see `Engine.prefill`."""

    @property
    def row_bonus(self) -> Tensor:
        """(rows, 1), zero for guides."""
        bonus = torch.full((len(self.text), 1), self.text_bonus, device=self.text.device)
        if self.guidance_scale is not None:
            bonus[len(bonus) // 2 :] = 0.0
        return bonus

    def to(self, device: torch.device) -> "Conditioning":
        return replace(self, text=self.text.to(device), text_mask=self.text_mask.to(device))

    def pad_text(self, multiple: int) -> "Conditioning":
        """Pad texts to a multiple of so many tokens. What they pad with is masked."""
        missing = -self.text.shape[1] % multiple
        if not missing:
            return self
        text, mask = F.pad(self.text, (missing, 0)), F.pad(self.text_mask, (missing, 0), value=False)
        return replace(self, text=text, text_mask=mask)

    @classmethod
    def from_tokens(
        cls,
        texts: Sequence[Sequence[int]],
        guides: Sequence[Sequence[int]],
        pad: int,
        *,
        guidance_scale: float | None,
        text_bonus: float,
    ) -> "Conditioning":
        """From token ids, padded to the longest text. `guides`: as many as `texts`, or none without guidance."""
        assert len(guides) == (len(texts) if guidance_scale is not None else 0)
        rows = [*texts, *guides]
        text, mask = left_pad(rows, max(map(len, rows)), pad)
        return cls(torch.from_numpy(text), torch.from_numpy(mask), guidance_scale, text_bonus)


@dataclass
class ClipState:
    """A batch of clips in decoding."""

    program: Program
    conditioning: Conditioning
    text_bias: TextBias
    tokens: Tensor
    """(clips, 1 + num_slots) int64: BOI, then what is known or sampled so far."""
    cache: KVCache
    sampler: TokenSampler
    uniforms: Tensor
    """(clips, num_slots, 2)."""
    progress: Progress | None

    def input_tokens(self, inputs: StepInputs) -> Tensor:
        """(rows, slots), guides after the clips."""
        tokens = self.tokens.index_select(1, inputs.input_columns)
        return tokens if self.conditioning.guidance_scale is None else tokens.repeat(2, 1)

    def step(self, inputs: StepInputs) -> DecodeInputs:
        return DecodeInputs(self.input_tokens(inputs), inputs.slots, self.program.masks, self.text_bias, self.cache)

    def sample(self, logits: Tensor, slots: Tensor) -> Tensor:
        """Tokens (clips, slots) from the logits of a step, guides included."""
        logits = apply_guidance(logits, self.conditioning.guidance_scale)
        return self.sampler(logits, self.uniforms.index_select(1, slots))

    def report(self, num_tokens: int) -> None:
        if self.progress is not None:
            self.progress(num_tokens)


class Engine:
    """One model, ready to decode with one backend. Threads may call `generate` at the same time: they share passes."""

    def __init__(self, model: CogVideoTransformer, backend: str = "auto") -> None:
        """`backend`: a name of `backends.BACKENDS`, or "auto". Raises: ValueError as `backends.open_backend`."""
        self.model = model
        self.backend = open_backend(backend, model)
        self.scheduler = BatchScheduler(self.backend.decode)
        self.prefill_passes = 0
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        return self.model.final_layernorm.weight.device

    @property
    def forward_passes(self) -> int:
        """Prefill and decoding so far; a pass that several requests shared counts once."""
        return self.prefill_passes + self.scheduler.forward_passes

    @torch.inference_mode()
    def generate(
        self,
        program: Program,
        known: Tensor,
        conditioning: Conditioning,
        sampler: TokenSampler,
        uniforms: Tensor,
        progress: Progress | None = None,
    ) -> Tensor:
        """Sample every token that the program decodes, for one batch of clips.

        Shapes: known (clips, num_slots) int64, correct at given slots, anything elsewhere; uniforms (clips,
        num_slots, 2) -> (clips, num_slots) on the device of `known`. num_slots: the clip's, or as many as the program
        needs. Program and sampler must be on the engine's device, the rest is moved there.
        """
        assert not self.model.training, "dropout is on; call model.eval() first"
        conditioning = conditioning.pad_text(self.backend.text_multiple).to(self.device)
        start_of_image = self.model.config.vocabulary.start_of_image
        tokens = F.pad(known.to(self.device), (1, 0), value=start_of_image)
        cache = self.backend.allocate(
            *conditioning.text.shape,
            temporal=program.temporal,
            spatial_capacity=program.spatial_capacity,
            temporal_capacity=program.temporal_capacity,
        )
        text_bias = TextBias.from_mask(conditioning.text_mask, conditioning.row_bonus, conditioning.row_bonus)
        uniforms = uniforms.to(self.device)
        state = ClipState(program, conditioning, text_bias, tokens, cache, sampler, uniforms, progress)
        first_logits = self.prefill(state)
        decode = decode_steps if program.draft is None else decode_speculative
        self.scheduler.run(decode(state, first_logits))
        return state.tokens[:, 1:].to(known.device)

    def prefill(self, state: ClipState) -> Tensor | None:
        """Fill the cache with text and given frames; without given frames, return the logits of the first step.

        The text bonus reaches given frames in the spatial channel only, as in published inference, which the published
        settings were tuned with.
        """
        program, conditioning = state.program, state.conditioning
        text = conditioning.text
        if program.given is None:
            if program.draft is None:
                first = program.steps[0]
            else:
                first = program.draft.window_from(0)
                guess_tokens(state.tokens, program.draft, 0, len(first.slots))
            self._count_prefill()
            plan = program.masks.plan(first.slots)
            hidden = self.model(state.input_tokens(first), plan, state.text_bias, text=text, cache=state.cache)
            return self.model.logits(hidden)
        given, plan = program.given
        tokens = state.input_tokens(given)
        # some clips at a time: the activations of all would be sampling's peak in memory
        clips_at_once = max(1, PREFILL_SLOTS // tokens.shape[1])
        bias = TextBias.from_mask(conditioning.text_mask, conditioning.row_bonus, 0.0)
        for first_clip in range(0, len(text), clips_at_once):
            clips = slice(first_clip, first_clip + clips_at_once)
            self._count_prefill()
            clips_bias = TextBias(bias.spatial[clips], bias.temporal[clips])
            self.model(tokens[clips], plan, clips_bias, text=text[clips], cache=state.cache.select(clips))
        return None

    def _count_prefill(self) -> None:
        with self._lock:
            self.prefill_passes += 1


def decode_steps(state: ClipState, logits: Tensor | None) -> Decoding:
    """Run the program's steps. `logits`: of the first step, where prefill has computed them."""
    for inputs in state.program.steps:
        if logits is None:
            logits = yield state.step(inputs)
        sampled = state.sample(logits, inputs.slots)
        state.tokens.index_copy_(1, inputs.slots + 1, sampled)
        state.report(sampled.numel())
        logits = None


def decode_speculative(state: ClipState, logits: Tensor | None) -> Decoding:
    """The same tokens as `decode_steps`, by verifying guesses; `schedules.speculative` says why this is exact.

    Clips of a batch advance at their own pace within a window, which begins at the slowest. Keys in the cache are final
    once the slot's token is: both were computed from the same, final, inputs.
    """
    tokens, draft = state.tokens, state.program.draft
    assert draft is not None
    num_final = torch.zeros_like(tokens[:, 0])
    """(clips,) slots whose tokens are final, in the order of decoding."""
    start, num_guessed = 0, 0
    while start < draft.num_slots:
        window = draft.window_from(start)
        end = start + len(window.slots)
        if logits is None:  # else prefill has guessed the first window's tokens
            guess_tokens(tokens, draft, num_guessed, end)
            logits = yield state.step(window)
        num_guessed = max(num_guessed, end)
        sampled = state.sample(logits, window.slots)
        logits = None
        # a clip's tokens are right up to the first that differs from its guess, and that one is right as well
        guess = tokens.index_select(1, window.slots + 1)
        final = torch.arange(start, num_guessed, device=tokens.device) < num_final[:, None]
        right = (final | (sampled == guess)).cumprod(1).sum(1)
        tokens.index_copy_(1, window.slots + 1, torch.where(final, guess, sampled))
        before, num_final = num_final, torch.maximum(num_final, (start + right + 1).clamp(max=num_guessed))
        start = int(num_final.min())
        state.report(int((num_final - before).sum()))


def guess_tokens(tokens: Tensor, draft: DraftPlan, start: int, end: int) -> None:
    """Write the first guesses for the start-th to end-th slots (end excluded) into tokens (clips, 1 + num_slots)."""
    fresh = slice(start, end)
    tokens[:, draft.inputs.slots[fresh] + 1] = tokens[:, draft.guess_from[fresh] + 1]


def apply_guidance(logits: Tensor, scale: float | None) -> Tensor:
    """Classifier-free guidance: (2 * clips, ...) -> (clips, ...); unchanged without a scale."""
    if scale is None:
        return logits
    conditional, guide = rearrange(logits, "(two clips) ... -> two clips ...", two=2)
    return torch.lerp(guide, conditional, scale)
