"""Schedules: which slots of a clip are decoded together, as data. Nothing here runs a model.

    sequential    one slot per step, frame after frame
    wavefront     as few steps as the masks allow, with several frames in flight
    speculative   one slot after another, many drafted ahead and verified in one forward pass

A schedule may list slots in any order that follows two rules, see `check_schedule`: a slot comes after its left
neighbour, whose token is its input; and what it attends to is given, or decoded in an earlier step or in the same one.
Random numbers are keyed by slot, so every schedule that follows the rules gives the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cogvideo.model.masks import Mask, channel_masks
from cogvideo.sequence.layout import ClipLayout

DRAFT_WINDOW = 16
"""Slots per speculative forward pass: about as many as take little longer than one when reading weights dominates."""
_GIVEN, _NEVER = -1, np.iinfo(np.int64).max


@dataclass(frozen=True)
class Draft:
    """How tokens are guessed, before many are verified at a time."""

    source: np.ndarray
    """(num_slots,) for each slot, the slot whose token is its first guess; -1: none."""
    window: int
    """Maximum number of slots per forward pass."""


@dataclass(frozen=True)
class Schedule:
    """A way to decode some frames of a clip while others are given."""

    given: np.ndarray
    """Slots whose tokens are known before the first step; one forward pass computes them all."""
    steps: tuple[np.ndarray, ...]
    """Slots whose tokens are sampled, step by step; those of one step share a forward pass."""
    draft: Draft | None = None
    """Set for speculative decoding; the steps then only give the order of slots."""

    @property
    def order(self) -> np.ndarray:
        """All slots that are decoded, in the order of their steps."""
        return np.concatenate([np.empty(0, np.int64), *self.steps])


def sequential(
    layout: ClipLayout, given: Sequence[int], frames: Sequence[int], window_size: int | None = None
) -> Schedule:
    """One slot per step, frame after frame. `given` and `frames` are frame numbers, in processing order."""
    no_slots = np.empty(0, dtype=np.int64)
    return Schedule(layout.slots_of(*given) if given else no_slots, tuple(layout.slots_of(*frames)[:, None]))


def wavefront(
    layout: ClipLayout, given: Sequence[int], frames: Sequence[int], window_size: int | None = None
) -> Schedule:
    """The slots of `sequential`, each in the earliest step that the masks allow.

    With windows in the temporal channel, a slot does not see all of the frames before its own, so the next frame starts
    while this one is still being decoded. A slot runs once, through all layers, so it waits for what it sees in any of
    them: those slots must be given, have run before, or run in the same step, where all keys are stored before any is
    read. What those slots see has then run as well, so dependencies across layers need not be traced.

    For windows of w x w slots in frames of r x r, each frame is (w - 1) (r + 1) steps behind the previous one. Without
    windows, only a frame's last slot and the next frame's first share a step.
    Raises: ValueError if a frame sees slots that are neither given nor decoded before it.
    """
    schedule = sequential(layout, given, frames)
    order = schedule.order
    spatial, temporal = channel_masks(layout, window_size)
    every_slot = np.arange(layout.num_slots)
    visible = np.zeros((len(order), layout.num_slots), dtype=bool)
    for mask in (spatial, *temporal):
        visible |= mask.allowed(order[:, None], every_slot)
    visible[np.arange(len(order)), order] = False

    step_of = np.full(layout.num_slots, _NEVER)
    step_of[schedule.given] = _GIVEN
    for slot, keys in zip(order, visible, strict=True):
        input_step = step_of[slot - 1] if slot % layout.frame_len else _GIVEN
        keys_step = step_of[keys].max(initial=0)
        if keys_step == _NEVER:
            raise _missing_key(layout, slot, every_slot[keys][step_of[keys].argmax()])
        step_of[slot] = max(input_step + 1, keys_step)

    steps = step_of[order]
    by_step = order[np.argsort(steps, kind="stable")]
    return Schedule(schedule.given, tuple(np.split(by_step, np.cumsum(np.bincount(steps))[:-1])))


def speculative(
    layout: ClipLayout,
    given: Sequence[int],
    frames: Sequence[int],
    window_size: int | None = None,
    *,
    draft_window: int = DRAFT_WINDOW,
) -> Schedule:
    """The slots of `sequential` in the same order, up to `draft_window` per forward pass, with identical tokens.

    The two random numbers of a slot are fixed before decoding, so its token is a function of the tokens before it. A
    window of slots is fed guesses, and each slot's token is sampled from its logits. The first token that differs from
    its guess is right all the same, since everything before it was; those after it came from a wrong input and are only
    better guesses for the next forward pass (Jacobi iteration). Guesses affect nothing but the number of passes.

    The first guess for a slot is the token at the same position in the nearest available frame: a given one in
    interpolation, the previous one in stage 1. Without such a frame it is the token of the slot above.
    """
    schedule = sequential(layout, given, frames)
    decoded = set((schedule.given // layout.frame_len).tolist())
    source = np.full(layout.num_slots, -1)
    for frame in dict.fromkeys((schedule.order // layout.frame_len).tolist()):
        if decoded:
            nearest = min(decoded, key=lambda other: (abs(other - frame), other))
            source[layout.slots_of(frame)] = layout.slots_of(nearest)
        else:
            slots = layout.slots_of(frame)
            source[slots[layout.frame_side :]] = slots[: -layout.frame_side]
        decoded.add(frame)
    return replace(schedule, draft=Draft(source, draft_window))


SCHEDULES: dict[str, Callable[[ClipLayout, Sequence[int], Sequence[int], int | None], Schedule]] = {
    "sequential": sequential,
    "wavefront": wavefront,
    "speculative": speculative,
}
"""By name: (layout, given frames, frames to decode, window size of the temporal channel) -> schedule."""


def check_schedule(schedule: Schedule, layout: ClipLayout, masks: Sequence[Mask]) -> None:
    """Raise ValueError unless every slot has its input and all keys that `masks` let it see.

    Keys must be given, or decoded in an earlier step or in the same one; the input, the token of the left neighbour,
    must be given or sampled in an earlier step. Otherwise a missing key would silently be read from the cache as zeros.
    """
    slots = np.concatenate([schedule.given, schedule.order])
    outside = slots[(slots < 0) | (slots >= layout.num_slots)]
    if len(outside):
        raise ValueError(f"the schedule has slot {outside[0]}; expected slots from 0 to {layout.num_slots - 1}")
    numbers, counts = np.unique(slots, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"the schedule has slot {numbers[counts > 1][0]} more than once; list each slot only once")

    # the step that computes each slot; speculative windows move, so there every slot counts as a step of its own
    step_of = np.full(layout.num_slots, _NEVER)
    step_of[schedule.given] = _GIVEN
    sizes = [1] * len(schedule.order) if schedule.draft else [len(step) for step in schedule.steps]
    step_of[schedule.order] = np.repeat(np.arange(len(sizes)), sizes)

    has_left = slots[slots % layout.frame_len > 0]
    late = has_left[(step_of[has_left - 1] >= step_of[has_left]) & (step_of[has_left - 1] > _GIVEN)]
    if len(late):
        raise ValueError(
            f"slot {late[0]} of the schedule takes the token of slot {late[0] - 1} as its input, which is not sampled "
            f"in an earlier step; decode slot {late[0] - 1} first"
        )
    every_slot = np.arange(layout.num_slots)
    for frame in np.unique(slots // layout.frame_len):
        queries = slots[slots // layout.frame_len == frame]
        visible = np.zeros((len(queries), layout.num_slots), dtype=bool)
        for mask in masks:
            visible |= mask.allowed(queries[:, None], every_slot)
        latest = np.where(visible, step_of, _GIVEN).argmax(1)
        missing = np.flatnonzero(step_of[latest] > step_of[queries])
        if len(missing):
            raise _missing_key(layout, queries[missing[0]], latest[missing[0]])
    if schedule.draft is not None:
        sources = schedule.draft.source[schedule.order]
        unknown = schedule.order[(sources >= 0) & (step_of[sources] >= step_of[schedule.order])]
        if len(unknown):
            raise ValueError(
                f"the first guess for slot {unknown[0]} is the token of slot {schedule.draft.source[unknown[0]]}, "
                "which has not been sampled by then; draft from slots that are decoded earlier"
            )


def _missing_key(layout: ClipLayout, query: int, key: int) -> ValueError:
    n = layout.frame_len
    return ValueError(
        f"slot {query} of the schedule (frame {query // n}) attends to slot {key} (frame {key // n}), which is neither "
        "given nor decoded by then; decode it in an earlier step or give its frame"
    )


def spatial_cache_positions(schedule: Schedule, layout: ClipLayout) -> np.ndarray:
    """Where the spatial channel's cache stores each slot, in as little memory as possible: (num_slots,) int64.

    In this channel only a slot's own frame sees it, so after a frame's last step its positions are free for another
    frame. Given frames are computed in one pass and are not stored: -1.
    """
    order = schedule.order
    if schedule.draft is None:
        starts = ends = np.repeat(np.arange(len(schedule.steps)), [len(step) for step in schedule.steps])
    else:  # counted in slots, as windows move: one that begins near a frame's end reaches into the next
        ends = np.arange(len(order))
        starts = ends - schedule.draft.window + 1
    frames = order // layout.frame_len
    spans = [(starts[frames == frame].min(), ends[frames == frame].max(), frame) for frame in np.unique(frames)]
    positions = np.full(layout.num_slots, -1)
    # the cache is divided into regions of one frame each; a frame takes the first region that is free when it starts
    last_use: list[int] = []
    for start, end, frame in sorted(spans):
        region = next((i for i, used in enumerate(last_use) if used < start), len(last_use))
        last_use[region:] = [end, *last_use[region + 1 :]]
        positions[layout.slots_of(frame)] = region * layout.frame_len + np.arange(layout.frame_len)
    return positions
