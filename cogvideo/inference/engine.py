"""Runs a model over a schedule of slots with a key/value cache, independent of stages, captions and pixels.

    program = build_program(model.config, sequential(layout, given=(0,), frames=(1, 2, 3, 4)))      # once
    engine = Engine(model)                                                                          # once per model
    tokens = engine.generate(program.to(engine.device), known, conditioning, sampler, uniforms)     # for each batch

Classifier-free guidance doubles the batch: conditional rows first, then their guides, in a single forward pass.
"""

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

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
from cogvideo.model.plan import CachePositions, DecodeMasks, GivenWindows, Plan, plan_forward, window_positions
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.prompt import left_pad

Progress = Callable[[int], object]
"""Called with the number of tokens just sampled."""
KEPT_BATCHES = 4
"""Number of batch kinds whose memory and CUDA graphs are kept for reuse."""
PREFILL_SLOTS = 2048
"""Maximum number of slots per prefill pass, summed over clips; a pass always takes at least one clip."""
_Result = TypeVar("_Result")
_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()
_engines_lock = threading.Lock()
_releases: Counter[torch.device] = Counter()
"""How often memory that engines kept was released because a device ran out."""


@dataclass(frozen=True)
class DraftPlan:
    """The slots of speculative decoding, in order; where each window begins is decided while decoding."""

    slots: Tensor
    """(slots,) int64."""
    guess_from: Tensor
    """(slots,) for each slot, the slot whose token is its first guess; -1: none."""
    window: int

    def window_from(self, start: int) -> Tensor:
        """The slots of the window that begins at index `start`."""
        return self.slots[start : start + self.window]

    def to(self, device: torch.device) -> "DraftPlan":
        return DraftPlan(self.slots.to(device), self.guess_from.to(device), self.window)


@dataclass(frozen=True, eq=False)
class Program:
    """A schedule prepared for models of one configuration; it holds no weights and no state."""

    given: Plan | None
    """The forward pass over given frames."""
    masks: DecodeMasks
    """What decoding steps attend to."""
    input_columns: Tensor
    """(num_slots,) the column of each slot's input in `ClipState.tokens`: 0 for BOI, else 1 + the previous slot."""
    steps: tuple[Tensor, ...]
    """For each forward pass, the slots (rows,) int64 that it predicts. Empty for speculative decoding."""
    draft: DraftPlan | None
    temporal: bool
    spatial_capacity: int
    temporal_capacity: int
    """Frame slots that each channel's cache must have room for."""

    @property
    def tokens_per_clip(self) -> int:
        """Number of tokens sampled per clip."""
        return len(self.draft.slots) if self.draft else sum(map(len, self.steps))

    def to(self, device: torch.device) -> "Program":
        if device.type == "cpu":
            return self
        return replace(
            self,
            given=self.given and self.given.to(device),
            masks=self.masks.to(device),
            input_columns=self.input_columns.to(device),
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
    """Prepare a schedule. `temporal=False` runs the trunk alone, as a text-to-image model of one frame. `joined`: plan
    the pass over given frames for models with joined attention, see `CogVideoTransformer.is_joined`.

    Raises: ValueError if the schedule breaks a rule of `check_schedule`.
    """
    spatial_mask, by_layer = channel_masks(config.layout, config.window_size, wrap_given=given_windows == "wrapped")
    use_temporal = temporal and config.has_temporal_channel
    check_schedule(schedule, config.layout, (spatial_mask, *(by_layer if use_temporal else ())))
    used = np.concatenate([schedule.given, schedule.order])
    in_time = tuple(window_positions(mask, used) for mask in by_layer)
    positions = CachePositions(spatial_cache_positions(schedule, config.layout), in_time)
    masks = DecodeMasks.from_config(config, temporal=temporal, given_windows=given_windows, positions=positions)
    given = None
    if len(schedule.given):
        given = plan_forward(
            config,
            schedule.given,
            temporal=temporal,
            given_windows=given_windows,
            positions=positions,
            joined=joined,
        )
    # the left neighbour of slot s is s - 1, in column s; the first slot of each frame takes BOI
    every_slot = np.arange(config.layout.num_slots)
    columns = np.where(every_slot % config.frame_len, every_slot, 0)
    steps: tuple[Tensor, ...] = ()
    draft = None
    if schedule.draft is None:
        steps = tuple(torch.from_numpy(step.astype(np.int64)) for step in schedule.steps)
    else:
        order = torch.from_numpy(schedule.order.astype(np.int64))
        draft = DraftPlan(order, torch.from_numpy(schedule.draft.source[schedule.order]), schedule.draft.window)
    return Program(
        given,
        masks,
        torch.from_numpy(columns),
        steps,
        draft,
        temporal=temporal,
        spatial_capacity=int(positions.spatial.max()) + 1,
        temporal_capacity=len(used),
    )


@dataclass(frozen=True)
class Conditioning:
    """The text prompts of a batch of clips, and how strongly they steer it."""

    text: Tensor
    """(rows, text_len) int64, padded on the left; rows = clips, or twice as many with guidance, guides last."""
    text_mask: Tensor
    """(rows, text_len) bool, False on padding."""
    guidance_scale: float | None = None
    """Logits become guide + scale * (conditional - guide); None: no guidance."""
    text_bonus: float = 0.0
    """Added to scores of text keys ("attention upweighting"), except for guides, as published; see `Engine.prefill`."""

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
        """Pad texts to a multiple of this many tokens; the padding is masked."""
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


class ProgressOnce:
    """A `Progress` that does not recount tokens when a batch is restarted."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._drawn = self._reported = 0

    def begin_again(self) -> None:
        self._drawn = 0

    def __call__(self, num_tokens: int) -> None:
        self._drawn += num_tokens
        new = self._drawn - self._reported
        if new > 0:
            self._reported = self._drawn
            if self._progress is not None:
                self._progress(new)


class BatchKind(NamedTuple):
    """What batches must have in common to reuse the same memory and recorded graphs."""

    program: Program
    sampler: TokenSampler
    guidance_scale: float | None
    num_rows: int
    text_len: int
    num_slots: int
    uniforms_dtype: torch.dtype


@dataclass(eq=False)
class ClipState:
    """A batch of clips being decoded. As a step's `Draw`, it samples tokens and writes them."""

    kind: BatchKind
    cache: KVCache
    text_bias: TextBias
    tokens: Tensor
    """(clips, 1 + num_slots) int64: BOI, then the tokens known or sampled so far."""
    uniforms: Tensor
    """(clips, num_slots, 2)."""
    progress: Progress | None = None

    @classmethod
    def allocate(cls, kind: BatchKind, cache: KVCache, start_of_image: int, device: torch.device) -> "ClipState":
        clips = kind.num_rows if kind.guidance_scale is None else kind.num_rows // 2
        spatial, temporal = torch.empty(2, kind.num_rows, kind.text_len, device=device)
        tokens = torch.full((clips, 1 + kind.num_slots), start_of_image, device=device)
        uniforms = torch.empty(clips, kind.num_slots, 2, dtype=kind.uniforms_dtype, device=device)
        return cls(kind, cache, TextBias(spatial, temporal), tokens, uniforms)

    def begin(self, known: Tensor, conditioning: Conditioning, uniforms: Tensor, progress: Progress | None) -> None:
        """Copy a batch's inputs into the buffers that steps read."""
        bias = TextBias.from_mask(conditioning.text_mask, conditioning.row_bonus, conditioning.row_bonus)
        own = *self.text_bias, self.tokens[:, 1:], self.uniforms
        for read, given in zip(own, (*bias, known, uniforms), strict=True):
            read.copy_(given)
        self.progress = progress

    def step(self, slots: Tensor, *, draw: bool = False) -> DecodeInputs:
        """A decoding step over `slots`. With `draw` its result is sampled tokens, otherwise logits."""
        tokens = None if draw else self.input_tokens(slots)
        masks = self.kind.program.masks
        return DecodeInputs(tokens, slots, masks, self.text_bias, self.cache, self if draw else None)

    def input_tokens(self, slots: Tensor) -> Tensor:
        """Input tokens (rows, slots), guides last."""
        tokens = self.tokens.index_select(1, self.kind.program.input_columns.index_select(0, slots))
        return tokens if self.kind.guidance_scale is None else tokens.repeat(2, 1)

    def sample(self, logits: Tensor, slots: Tensor) -> Tensor:
        """Sample tokens (clips, slots) from the logits of a step, which include those of the guides."""
        logits = apply_guidance(logits, self.kind.guidance_scale)
        return self.kind.sampler(logits, self.uniforms.index_select(1, slots))

    def __call__(self, logits: Tensor, slots: Tensor) -> Tensor:
        """Sample a step's tokens, and write them where later steps read them."""
        sampled = self.sample(logits, slots)
        self.tokens.index_copy_(1, slots + 1, sampled)
        return sampled

    def report(self, num_tokens: int) -> None:
        if self.progress is not None:
            self.progress(num_tokens)


class Engine:
    """One model, ready to decode with one backend. Threads may call `generate` concurrently: they share passes."""

    def __init__(self, model: CogVideoTransformer, backend: str = "auto") -> None:
        """`backend`: a name of `backends.BACKENDS`, or "auto". Raises: ValueError as `backends.open_backend`."""
        self.model = model
        self.backend = open_backend(backend, model)
        self.scheduler = BatchScheduler(self.backend.decode)
        self.prefill_passes = 0
        self._kept: dict[BatchKind, ClipState] = {}
        """Memory of finished batches, the most recently used last."""
        self._lock = threading.Lock()
        with _engines_lock:
            _engines.add(self)

    @property
    def device(self) -> torch.device:
        return self.model.final_layernorm.weight.device

    @property
    def forward_passes(self) -> int:
        """Prefill and decoding passes so far; one shared by several requests counts once."""
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
        num_slots, 2) -> (clips, num_slots) on the device of `known`. num_slots: the clip's, or only as many as the
        program needs. Program and sampler must be on the engine's device; the rest is moved there. If the device runs
        out of memory while engines keep that of earlier batches, it is released, and the batch is restarted once.
        """
        assert not self.model.training, "dropout is on; call model.eval() first"
        conditioning = conditioning.pad_text(self.backend.text_multiple).to(self.device)
        rows, text_len = conditioning.text.shape
        scale, num_slots = conditioning.guidance_scale, known.shape[1]
        kind = BatchKind(program, sampler, scale, rows, text_len, num_slots, uniforms.dtype)
        decode = decode_steps if program.draft is None else decode_speculative
        report, releases, is_retry = ProgressOnce(progress), _releases[self.device], False
        while True:
            try:
                with self._state(kind) as state:
                    state.begin(known, conditioning, uniforms, report)
                    first_logits = self.prefill(state, conditioning)
                    self.scheduler.run(decode(state, first_logits))
                    # a copy: the next batch may write to the same memory
                    return state.tokens[:, 1:].to(known.device, copy=True)
            except torch.OutOfMemoryError:
                if is_retry or not release_kept(self.device, releases):
                    raise
            # outside the handler: its traceback keeps the failed batch's memory alive, and so do these names
            state = first_logits = None  # type: ignore[assignment]
            report.begin_again()
            is_retry = True

    def forget_batches(self) -> bool:
        """Release the memory of finished batches. Returns whether there was any."""
        with self._lock:
            had_any = bool(self._kept)
            self._kept.clear()
            return had_any

    @contextlib.contextmanager
    def _state(self, kind: BatchKind) -> Iterator[ClipState]:
        """Memory for a batch: that of a finished batch of the same kind, if one is kept, else new memory."""
        with self._lock:
            state = self._kept.pop(kind, None)
        if state is None:
            state = self._allocate(kind)
        yield state
        if self.backend.keeps_batches:
            state.progress = None
            with self._lock:
                self._kept.pop(kind, None)
                self._kept[kind] = state
                while len(self._kept) > KEPT_BATCHES:
                    del self._kept[next(iter(self._kept))]

    def _allocate(self, kind: BatchKind) -> ClipState:
        cache = self.backend.allocate(
            kind.num_rows,
            kind.text_len,
            temporal=kind.program.temporal,
            spatial_capacity=kind.program.spatial_capacity,
            temporal_capacity=kind.program.temporal_capacity,
        )
        return ClipState.allocate(kind, cache, self.model.config.vocabulary.start_of_image, self.device)

    def prefill(self, state: ClipState, conditioning: Conditioning) -> Tensor | None:
        """Fill the cache with text and given frames; without given frames, return the logits of the first step.

        The text bonus applies to given frames in the spatial channel only, as in published inference, for which the
        published settings were tuned.
        """
        program, text = state.kind.program, conditioning.text
        if program.given is None:
            if program.draft is None:
                first = program.steps[0]
            else:
                first = program.draft.window_from(0)
                guess_tokens(state.tokens, program.draft, 0, len(first))
            self._count_prefill()
            plan = program.masks.plan(first)
            hidden = self.model(state.input_tokens(first), plan, state.text_bias, text=text, cache=state.cache)
            return self.model.logits(hidden)
        plan = program.given
        tokens = state.input_tokens(plan.slots)
        # a few clips at a time: the activations of all at once would be the memory peak of sampling
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


def with_kept_memory_released(device: torch.device, work: Callable[[], _Result]) -> _Result:
    """Call `work`. If the device runs out of memory, release what engines keep there, and call it once more.

    Raises: torch.OutOfMemoryError if nothing was released since the first call began, or if the second one fails too.
    """
    releases = _releases[device]
    try:
        return work()
    except torch.OutOfMemoryError:
        if not release_kept(device, releases):
            raise
    return work()  # outside the handler: its traceback keeps the first call's memory alive


def release_kept(device: torch.device, releases: int) -> bool:
    """Release the memory of finished batches that engines keep on a device.

    Returns whether any was released, by this thread or another one, since `releases` was read from `_releases`.
    """
    with _engines_lock:
        here = [engine for engine in _engines if engine.device == device]
        _releases[device] += any([engine.forget_batches() for engine in here])
        return _releases[device] > releases


def decode_steps(state: ClipState, logits: Tensor | None) -> Decoding:
    """Run the program's steps. `logits`: those of the first step, if prefill computed them."""
    for slots in state.kind.program.steps:
        sampled = (yield state.step(slots, draw=True)) if logits is None else state(logits, slots)
        state.report(sampled.numel())
        logits = None


def decode_speculative(state: ClipState, logits: Tensor | None) -> Decoding:
    """Decode the same tokens as `decode_steps`, by verifying guesses; see `schedules.speculative` for why it is exact.

    Clips of a batch advance at their own pace within a window, which begins at the slowest clip. A slot's keys in the
    cache are final once its token is: both were computed from the same, final inputs.
    """
    tokens, draft = state.tokens, state.kind.program.draft
    assert draft is not None
    num_final = torch.zeros_like(tokens[:, 0])
    """(clips,) number of slots, in decoding order, whose tokens are final."""
    start, num_guessed = 0, 0
    while start < len(draft.slots):
        window = draft.window_from(start)
        end = start + len(window)
        if logits is None:  # else prefill has guessed the first window's tokens
            guess_tokens(tokens, draft, num_guessed, end)
            logits = yield state.step(window)
        num_guessed = max(num_guessed, end)
        sampled = state.sample(logits, window)
        logits = None
        # a clip's tokens are right up to and including the first one that differs from its guess
        guess = tokens.index_select(1, window + 1)
        final = torch.arange(start, num_guessed, device=tokens.device) < num_final[:, None]
        right = (final | (sampled == guess)).cumprod(1).sum(1)
        tokens.index_copy_(1, window + 1, torch.where(final, guess, sampled))
        before, num_final = num_final, torch.maximum(num_final, (start + right + 1).clamp(max=num_guessed))
        start = int(num_final.min())
        state.report(int((num_final - before).sum()))


def guess_tokens(tokens: Tensor, draft: DraftPlan, start: int, end: int) -> None:
    """Write first guesses for the draft's slots `start` to `end` (exclusive) into tokens (clips, 1 + num_slots)."""
    fresh = slice(start, end)
    tokens[:, draft.slots[fresh] + 1] = tokens[:, draft.guess_from[fresh] + 1]


def apply_guidance(logits: Tensor, scale: float | None) -> Tensor:
    """Classifier-free guidance: (2 * clips, ...) -> (clips, ...); unchanged without a scale."""
    if scale is None:
        return logits
    conditional, guide = rearrange(logits, "(two clips) ... -> two clips ...", two=2)
    return torch.lerp(guide, conditional, scale)
