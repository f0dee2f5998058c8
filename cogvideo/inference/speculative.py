"""Speculative decoding without any loss: guess some slots ahead, check all of them in one forward, keep what is right.

The two uniforms of a slot are fixed before decoding, so the token of a slot is a function of the tokens before it. A
window of slots is fed with guesses; from each slot's logits its token is drawn, with that slot's own numbers. The first
draw that is not what was guessed is right all the same, since everything before it was; what comes after it was drawn
from a wrong input, and is only a better guess for the next forward (Jacobi iteration). So the tokens are those of
sequential decoding, whatever is guessed; guesses decide the number of forwards alone.

The first guess for a slot is the same place of the nearest frame that is there: in interpolation a given one, in
stage 1 the frame before; in a first frame the slot above. Clips of a batch advance each at its own pace within the
window, which starts where the slowest stands.
"""

from dataclasses import replace

import numpy as np

from cogvideo.inference.schedules import Draft, Schedule
from cogvideo.sequence.layout import ClipLayout

WINDOW = 16
"""Slots in a forward: about as many as cost little more than one, where reading the weights is what takes time."""


def speculative(schedule: Schedule, layout: ClipLayout, window: int = WINDOW) -> Schedule:
    """The slots of a schedule in its order, up to `window` of them in each forward. Give it `schedules.sequential`."""
    order = np.concatenate(schedule.steps)
    there = set((schedule.given // layout.frame_len).tolist())
    source = np.full(layout.num_slots, -1)
    for frame in dict.fromkeys((order // layout.frame_len).tolist()):
        if there:
            nearest = min(there, key=lambda other: (abs(other - frame), other))
            source[layout.slots_of(frame)] = layout.slots_of(nearest)
        else:
            slots = layout.slots_of(frame)
            source[slots[layout.frame_side :]] = slots[: -layout.frame_side]
        there.add(frame)
    return replace(schedule, draft=Draft(source, window))
