"""The wavefront: a schedule's slots in as few steps as its masks allow, several frames in flight together.

With windows in the temporal channel a slot does not see all of the frames before its own, only the window around it,
so the next frame can start while this one is still being made. How far behind is not looked up but follows from the
masks. Without windows nothing but a frame's last slot can overlap with the next frame's first.

Drawing is not here, nor what a step computes: the tokens are those of the schedule given, in fewer steps.
"""

import numpy as np

from cogvideo.inference.schedules import Schedule
from cogvideo.model.masks import channel_masks
from cogvideo.sequence.layout import ClipLayout

_GIVEN, _NEVER = -1, np.iinfo(np.int64).max


def wavefront(schedule: Schedule, layout: ClipLayout, window_size: int | None) -> Schedule:
    """The same slots, each in the earliest step that it can have.

    A slot runs once, through all layers, so it waits for what it sees in any of them: those slots must be given, have
    run before, or run in the same step, where all keys are stored before any is read. What these saw has then run as
    well, so the reach over many layers needs no search. Its own input, the token on its left, must have been drawn
    in an earlier step.

    For windows of w x w slots in frames of r x r, that puts each frame (w - 1) (r + 1) steps behind the one before.
    `schedule` must itself be valid, such as `schedules.sequential`.
    """
    order = np.concatenate(schedule.steps)
    spatial, temporal = channel_masks(layout, window_size)
    every_slot = np.arange(layout.num_slots)
    seen = np.zeros((len(order), layout.num_slots), dtype=bool)
    for mask in (spatial, *temporal):
        seen |= mask.allowed(order[:, None], every_slot)
    seen[np.arange(len(order)), order] = False

    step_of = np.full(layout.num_slots, _NEVER)
    step_of[schedule.given] = _GIVEN
    for slot, sees in zip(order, seen, strict=True):
        input_drawn = step_of[slot - 1] if slot % layout.frame_len else _GIVEN
        keys_there = step_of[sees].max(initial=0)
        assert keys_there < _NEVER, f"slot {slot} sees what is neither given nor scheduled before it"
        step_of[slot] = max(input_drawn + 1, keys_there)

    steps = step_of[order]
    together = order[np.argsort(steps, kind="stable")]
    return Schedule(schedule.given, tuple(np.split(together, np.cumsum(np.bincount(steps))[:-1])))
