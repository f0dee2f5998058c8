"""The wavefront: as few steps as can be, every key in its place, and the tokens of sequential decoding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cogvideo.inference.engine import Conditioning, Program, compile_program, generate
from cogvideo.inference.sampler import ClusterDraw
from cogvideo.inference.schedules import Schedule, sequential, spatial_places
from cogvideo.inference.speculative import speculative
from cogvideo.inference.wavefront import wavefront
from cogvideo.model.config import Task
from cogvideo.model.initialise import initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.layout import ClipLayout
from tests.helpers import decoding as tiny
from tests.reference.masks import spatial_mask, temporal_mask

GRIDS = [(8, 4), (8, 2), (6, 3)]
"""Frame side and window size."""


def layout_of(task: Task, side: int, num_frames: int = 5) -> ClipLayout:
    build = ClipLayout.sequential if task == "sequential" else ClipLayout.interpolation
    return build(4, side, num_frames)


def plain(layout: ClipLayout) -> Schedule:
    return sequential(layout, layout.given_frames, layout.generation_order)


def steps_of(schedule: Schedule, layout: ClipLayout) -> np.ndarray:
    """(frames, frame_len): the step of each slot, -1 for given ones."""
    steps = np.full(layout.num_slots, -1)
    for number, slots in enumerate(schedule.steps):
        steps[slots] = number
    return steps.reshape(layout.num_frames, -1)


@pytest.mark.parametrize(
    ("task", "given", "frames", "window", "steps", "in_flight"),
    [
        ("sequential", (), (0, 1, 2, 3, 4), 10, 1156, 3),
        ("sequential", (0,), (1, 2, 3, 4), 10, 967, 3),
        ("interpolation", (0, 2, 4), (1, 3), 10, 589, 2),
        ("sequential", (), (0, 1, 2, 3, 4), 5, 736, 5),
        ("sequential", (), (0, 1, 2, 3, 4), None, 1996, 2),
    ],
)
def test_steps_at_the_published_grid(
    task: Task, given: tuple[int, ...], frames: tuple[int, ...], window: int | None, steps: int, in_flight: int
) -> None:
    layout = layout_of(task, 20)
    schedule = wavefront(sequential(layout, given, frames), layout, window)
    assert len(schedule.steps) == steps
    assert max(map(len, schedule.steps)) == in_flight
    assert sorted(np.concatenate(schedule.steps)) == sorted(layout.slots_of(*frames))


@pytest.mark.parametrize("grid", [*GRIDS, (4, 4), (4, 1), (5, 5), (10, 2)])
@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_lag_is_that_of_the_windows(task: Task, grid: tuple[int, int]) -> None:
    side, window = grid
    layout = layout_of(task, side)
    steps = steps_of(wavefront(plain(layout), layout, window), layout)
    lag = (window - 1) * (side + 1)
    for i, frame in enumerate(layout.generation_order):
        assert steps[frame].tolist() == list(range(i * lag, i * lag + layout.frame_len))
    assert (steps[list(layout.given_frames)] == -1).all()


def first_steps_by_search(task: Task, side: int, window: int, num_layers: int) -> np.ndarray:
    """When each slot could run at the earliest, by following what it sees through every layer of dense masks.

    All that makes it wait are tokens: the inputs of the slots that it depends on.
    """
    layout = layout_of(task, side, 5)
    n = layout.frame_len
    depends = np.eye(layout.num_slots, dtype=bool)
    for layer in range(num_layers):
        sees = temporal_mask(task, 5, side, window, window // 2 if layer % 2 else 0) | spatial_mask(task, 5, side)
        depends = (sees.astype(np.float32) @ depends.astype(np.float32)) > 0
    steps = np.full(layout.num_slots, -1)
    for frame in layout.generation_order:
        for slot in range(frame * n, frame * n + n):
            inputs = np.flatnonzero(depends[slot])
            inputs = inputs[inputs % n > 0]  # BOI is known
            steps[slot] = steps[inputs - 1].max(initial=-1) + 1
    return steps.reshape(5, n)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_no_schedule_has_fewer_steps(task: Task, grid: tuple[int, int]) -> None:
    layout = layout_of(task, grid[0])
    assert np.array_equal(
        steps_of(wavefront(plain(layout), layout, grid[1]), layout), first_steps_by_search(task, *grid, num_layers=6)
    )


def misplaced_keys(program: Program, frame_len: int) -> list[tuple[int, int]]:
    """(step, slot) of all that a step reads, as a key or as its input, though it is not there by then.

    In the spatial channel, which keeps slots of different frames at one place after another, (step, place) of what a
    step finds there that is of another frame than its own.
    """
    there = set(program.given[0].slots.tolist()) if program.given else set()
    missing = []
    kept = dict[int, int]()  # place: slot
    for number, step in enumerate(program.steps):
        own = set(step.slots.tolist())
        seen = torch.stack([sight.seen[step.slots].any(0) for sight in program.sights.temporal]).any(0)
        keys = set(seen.nonzero().flatten().tolist())
        inputs = {slot - 1 for slot in own if slot % frame_len}
        missing += [(number, slot) for slot in (keys - there - own) | (inputs - there)]
        there |= own

        spatial = program.sights.spatial
        kept |= dict(zip(spatial.places[step.slots].tolist(), step.slots.tolist(), strict=True))
        for slot in step.slots.tolist():
            places = spatial.seen[slot].nonzero().flatten().tolist()
            right = list(range(slot - slot % frame_len, slot + 1))
            missing += [(number, place) for place in places if kept.get(place) not in right]
            assert len(places) == len(right)
    return missing


@pytest.mark.parametrize("grid", [*GRIDS, (4, None)])
@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_every_key_is_there_when_it_is_read(task: Task, grid: tuple[int, int | None]) -> None:
    side, window = grid
    config = replace(tiny.CONFIG, task=task, frame_side=side, window_size=window, num_positions=128)
    layout = config.layout
    schedule = wavefront(plain(layout), layout, window)
    assert misplaced_keys(compile_program(config, schedule), layout.frame_len) == []

    late = layout.generation_order[-1]
    hasty = [step[step // layout.frame_len != late] for step in schedule.steps]
    for at, slot in enumerate(layout.slots_of(late), start=int(steps_of(schedule, layout)[late, 0]) - 1):
        hasty[at] = np.append(hasty[at], slot)
    hasty = [step for step in hasty if len(step)]
    assert misplaced_keys(compile_program(config, Schedule(schedule.given, tuple(hasty))), layout.frame_len) != []


@pytest.mark.parametrize(
    ("task", "num_frames", "side", "window", "guidance_scale"),
    [
        ("interpolation", 5, 8, 4, None),
        ("interpolation", 5, 8, 2, 3.0),
        ("interpolation", 5, 6, 3, 3.0),
        ("sequential", 3, 8, 4, 3.0),
        ("sequential", 3, 8, 2, None),
        ("sequential", 5, 6, 3, None),
    ],
)
def test_tokens_are_those_of_sequential_decoding(
    task: Task, num_frames: int, side: int, window: int, guidance_scale: float | None
) -> None:
    config = replace(
        tiny.CONFIG,
        task=task,
        num_layers=5,
        frame_side=side,
        window_size=window,
        num_positions=128,
        num_frames=num_frames,
    )
    model = CogVideoTransformer(config).eval()
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else None

    layout, rng = config.layout, np.random.default_rng(3)
    known = torch.from_numpy(rng.integers(tiny.NUM_CODES, size=(2, layout.num_slots)))
    uniforms = torch.from_numpy(rng.random((2, layout.num_slots, 2)))
    texts, guides = [tiny.encode("left"), tiny.encode("quickly right")], [tiny.encode("any")] * 2
    conditioning = Conditioning.of(
        texts,
        guides if guidance_scale else [],
        tiny.VOCABULARY.pad,
        guidance_scale=guidance_scale,
        text_bonus=0.0 if guidance_scale else 1.4,
    )
    draw = ClusterDraw(np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)

    one_by_one = plain(layout)
    together = wavefront(one_by_one, layout, window)
    assert len(together.steps) < len(one_by_one.steps)
    tokens = [
        generate(model, compile_program(config, schedule), known, conditioning, draw, uniforms)
        for schedule in (one_by_one, together)
    ]
    assert torch.equal(*tokens)
    assert len(tokens[0].unique()) > 10, "the test means nothing if all tokens are alike"


def test_frames_already_there_are_not_waited_for() -> None:
    """A clip continued from two frames: only those that are made wait for each other."""
    layout = ClipLayout.sequential(4, 6, 4)
    steps = steps_of(wavefront(sequential(layout, (0, 1), (2, 3)), layout, 3), layout)
    assert steps[2].tolist() == list(range(36))
    assert steps[3, 0] == 2 * 7


def test_a_frame_that_sees_what_nobody_makes_is_refused() -> None:
    layout = ClipLayout.sequential(4, 4, 3)
    with pytest.raises(AssertionError, match="neither given nor scheduled"):
        wavefront(sequential(layout, (0,), (2,)), layout, 2)


@pytest.mark.parametrize(
    ("task", "given", "frames", "window", "rooms"),
    [
        ("sequential", (0,), (1, 2, 3, 4), None, {"sequential": 1, "wavefront": 2, "speculative": 2}),
        ("interpolation", (0, 2, 4), (1, 3), 10, {"sequential": 1, "wavefront": 2, "speculative": 2}),
        ("sequential", (), (0, 1, 2, 3, 4), 5, {"sequential": 1, "wavefront": 5, "speculative": 2}),
    ],
)
def test_the_spatial_cache_keeps_frames_in_flight_alone(
    task: Task, given: tuple[int, ...], frames: tuple[int, ...], window: int | None, rooms: dict[str, int]
) -> None:
    layout = layout_of(task, 20)
    in_turn = sequential(layout, given, frames)
    made = {
        "sequential": in_turn,
        "wavefront": wavefront(in_turn, layout, window),
        "speculative": speculative(in_turn, layout),
    }
    for name, schedule in made.items():
        places = spatial_places(schedule, layout)
        assert (places[schedule.given] == -1).all()
        by_frame = places[layout.slots_of(*frames)].reshape(len(frames), 400)
        assert (by_frame % 400 == np.arange(400)).all()
        assert places.max() + 1 == 400 * rooms[name], name
