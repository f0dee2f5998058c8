"""Which slots are decoded together, as data. Nothing here runs a model.

A schedule may name its slots in any order that keeps two rules: a slot comes after its left neighbour's step (whose
token is its input), and what it sees is given, in an earlier step, or in its own. Draws are keyed by slot, so every
schedule that keeps them gives the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogvideo.sequence.layout import ClipLayout


@dataclass(frozen=True)
class Draft:
    """How slots are guessed, to be checked many at once (speculative.py)."""

    source: np.ndarray
    """(num_slots,) the slot whose token is the first guess; -1: none."""
    window: int
    """Slots a forward, at most."""


@dataclass(frozen=True)
class Schedule:
    """A way to decode some frames of a clip while others are given."""

    given: np.ndarray
    """Slots whose tokens are known before the first step; they go through the model once, all together."""
    steps: tuple[np.ndarray, ...]
    """Slots whose tokens are drawn, step by step; the slots of one step go through the model together."""
    draft: Draft | None = None
    """Guess and check: the steps then give the order only, and may each name one slot."""


def sequential(layout: ClipLayout, given: Sequence[int], frames: Sequence[int]) -> Schedule:
    """One slot a step, frame after frame. `given` and `frames` are frame numbers, in the order to take them."""
    no_slots = np.empty(0, dtype=np.int64)
    return Schedule(layout.slots_of(*given) if given else no_slots, tuple(layout.slots_of(*frames)[:, None]))


def spatial_places(schedule: Schedule, layout: ClipLayout) -> np.ndarray:
    """Where a cache of the spatial channel keeps each slot, in as little room as can be: (num_slots,) int64.

    Only its own frame sees a slot there, so a frame's room is free for another after its last step. Given frames go
    through the model at once and leave nothing behind: -1.
    """
    order = np.concatenate([np.empty(0, np.int64), *schedule.steps])
    if schedule.draft is None:
        begins = ends = np.repeat(np.arange(len(schedule.steps)), [len(step) for step in schedule.steps])
    else:  # steps are not known: counted in slots, a window that starts where a frame ends reaches into the next
        ends = np.arange(len(order))
        begins = ends - schedule.draft.window + 1
    frames = order // layout.frame_len
    spans = [(begins[frames == frame].min(), ends[frames == frame].max(), frame) for frame in np.unique(frames)]
    places = np.full(layout.num_slots, -1)
    last_use: list[int] = []  # of each frame's room
    for begin, end, frame in sorted(spans):
        room = next((i for i, used in enumerate(last_use) if used < begin), len(last_use))
        last_use[room:] = [end, *last_use[room + 1 :]]
        places[layout.slots_of(frame)] = room * layout.frame_len + np.arange(layout.frame_len)
    return places
