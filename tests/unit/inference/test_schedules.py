"""Schedules: as few steps as can be, every key in the cache when it is read, and the tokens of sequential decoding."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.dtypes import WeightName
from cogvideo.inference.engine import Conditioning, Engine, Program, build_program
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import (
    SCHEDULES,
    Draft,
    Schedule,
    sequential,
    spatial_cache_positions,
    speculative,
    wavefront,
)
from cogvideo.model.config import ModelTask
from cogvideo.model.initialise import initialise
from cogvideo.model.quantize import convert_weights
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.layout import ClipLayout
from tests.helpers import decoding as tiny
from tests.reference.masks import spatial_mask, temporal_mask

SAMPLER = ClusterSampler(np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)
GRIDS = [(8, 4), (8, 2), (6, 3)]
"""Frame side and window size."""


def layout_of(task: ModelTask, side: int, num_frames: int = 5) -> ClipLayout:
    build = ClipLayout.sequential if task == "sequential" else ClipLayout.interpolation
    return build(4, side, num_frames)


def build(name: str, layout: ClipLayout, window: int | None = None) -> Schedule:
    return SCHEDULES[name](layout, layout.given_frames, layout.generation_order, window)


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
def test_number_of_wavefront_steps_at_the_published_grid(
    task: ModelTask, given: tuple[int, ...], frames: tuple[int, ...], window: int | None, steps: int, in_flight: int
) -> None:
    layout = layout_of(task, 20)
    schedule = wavefront(layout, given, frames, window)
    assert len(schedule.steps) == steps
    assert max(map(len, schedule.steps)) == in_flight
    assert sorted(np.concatenate(schedule.steps)) == sorted(layout.slots_of(*frames))


@pytest.mark.parametrize("grid", [*GRIDS, (4, 4), (4, 1), (5, 5), (10, 2)])
@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_wavefront_frames_lag_by_the_windows(task: ModelTask, grid: tuple[int, int]) -> None:
    side, window = grid
    layout = layout_of(task, side)
    steps = steps_of(build("wavefront", layout, window), layout)
    lag = (window - 1) * (side + 1)
    for i, frame in enumerate(layout.generation_order):
        assert steps[frame].tolist() == list(range(i * lag, i * lag + layout.frame_len))
    assert (steps[list(layout.given_frames)] == -1).all()


def first_steps_by_search(task: ModelTask, side: int, window: int, num_layers: int) -> np.ndarray:
    """The earliest step of each slot, found by following dense masks through every layer.

    It waits for tokens only: the inputs of the slots that it depends on.
    """
    layout = layout_of(task, side, 5)
    n = layout.frame_len
    depends = np.eye(layout.num_slots, dtype=bool)
    for layer in range(num_layers):
        visible = temporal_mask(task, 5, side, window, window // 2 if layer % 2 else 0) | spatial_mask(task, 5, side)
        depends = (visible.astype(np.float32) @ depends.astype(np.float32)) > 0
    steps = np.full(layout.num_slots, -1)
    for frame in layout.generation_order:
        for slot in range(frame * n, frame * n + n):
            inputs = np.flatnonzero(depends[slot])
            inputs = inputs[inputs % n > 0]  # BOI is known
            steps[slot] = steps[inputs - 1].max(initial=-1) + 1
    return steps.reshape(5, n)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_no_schedule_has_fewer_steps_than_the_wavefront(task: ModelTask, grid: tuple[int, int]) -> None:
    layout = layout_of(task, grid[0])
    assert np.array_equal(
        steps_of(build("wavefront", layout, grid[1]), layout), first_steps_by_search(task, *grid, num_layers=6)
    )


def missing_keys(program: Program, frame_len: int) -> list[tuple[int, int]]:
    """(step, slot) of all keys and input tokens that a step reads before they are there.

    For the spatial channel, whose cache reuses positions, (step, position) of keys that are of another frame.
    """
    there = set(program.given.slots.tolist()) if program.given else set()
    missing = []
    stored = dict[int, int]()  # position: slot
    for number, step in enumerate(program.steps):
        own = set(step.tolist())
        keys = set[int]()
        for table in program.masks.temporal:
            slot_at = dict(zip(table.positions.tolist(), range(len(table.positions)), strict=True))
            keys |= {slot_at[position] for position in table.visible[step].any(0).nonzero().flatten().tolist()}
        inputs = {slot - 1 for slot in own if slot % frame_len}
        missing += [(number, slot) for slot in (keys - there - own) | (inputs - there)]
        there |= own

        spatial = program.masks.spatial
        stored |= dict(zip(spatial.positions[step].tolist(), step.tolist(), strict=True))
        for slot in step.tolist():
            positions = spatial.visible[slot].nonzero().flatten().tolist()
            expected = list(range(slot - slot % frame_len, slot + 1))
            missing += [(number, position) for position in positions if stored.get(position) not in expected]
            assert len(positions) == len(expected)
    return missing


@pytest.mark.parametrize("grid", [*GRIDS, (4, None)])
@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_every_key_is_in_the_cache_when_it_is_read(task: ModelTask, grid: tuple[int, int | None]) -> None:
    side, window = grid
    config = replace(tiny.CONFIG, task=task, frame_side=side, window_size=window, num_positions=128)
    layout = config.layout
    for name in ("sequential", "wavefront"):
        assert missing_keys(build_program(config, build(name, layout, window)), layout.frame_len) == []


def hasty(schedule: Schedule, layout: ClipLayout) -> Schedule:
    """A wavefront whose last frame runs one step too early."""
    late = layout.generation_order[-1]
    start = int(steps_of(schedule, layout)[late, 0])
    steps = [step[step // layout.frame_len != late] for step in schedule.steps]
    for number, slot in enumerate(layout.slots_of(late), start=start - 1):
        steps[number] = np.append(steps[number], slot)
    return Schedule(schedule.given, tuple(step for step in steps if len(step)))


def swapped(schedule: Schedule, a: int, b: int) -> Schedule:
    steps = list(schedule.steps)
    steps[a], steps[b] = steps[b], steps[a]
    return replace(schedule, steps=tuple(steps))


BROKEN: dict[str, tuple[Callable[[Schedule, ClipLayout], Schedule], str]] = {
    "a slot that does not exist": (
        lambda s, l: replace(s, steps=(*s.steps, np.array([l.num_slots]))),
        r"has slot 80; expected slots from 0 to 79",
    ),
    "a slot twice": (lambda s, l: replace(s, steps=(*s.steps, s.steps[3])), "has slot 19 more than once"),
    "a given slot decoded again": (lambda s, l: replace(s, steps=(*s.steps, s.given[:1])), "slot 0 more than once"),
    "an input sampled in the same step": (
        lambda s, l: replace(s, steps=(np.concatenate(s.steps[:2]), *s.steps[2:])),
        "slot 17 of the schedule takes the token of slot 16 as its input",
    ),
    "an input sampled later": (lambda s, l: swapped(s, 5, 6), "slot 22 of the schedule takes the token of slot 21"),
    "an input that is never sampled": (
        lambda s, l: replace(s, steps=(*s.steps[:5], *s.steps[6:])),
        "slot 22 of the schedule takes the token of slot 21",
    ),
    "a frame that is neither given nor decoded": (
        lambda s, l: replace(s, steps=s.steps[l.frame_len :]),
        r"slot 32 of the schedule \(frame 2\) attends to slot 16 \(frame 1\), which is neither given",
    ),
    "no given frame": (
        lambda s, l: replace(s, given=s.given[:0]),
        r"slot 16 of the schedule \(frame 1\) attends to slot 0 \(frame 0\)",
    ),
    "a frame one step too early": (
        lambda s, l: hasty(build("wavefront", l, 2), l),
        r"slot \d+ of the schedule \(frame 4\) attends to slot \d+ \(frame 3\)",
    ),
    "a given frame that sees a decoded one": (
        lambda s, l: Schedule(l.slots_of(0, 2), tuple(l.slots_of(1, 3, 4)[:, None])),
        r"slot 32 of the schedule \(frame 2\) attends to slot \d+ \(frame 1\)",
    ),
    "a speculative order with a late frame": (
        lambda s, l: replace(speculative(l, (0,), (1, 2, 3, 4)), steps=s.steps[l.frame_len :] + s.steps[: l.frame_len]),
        r"slot 32 of the schedule \(frame 2\) attends to slot \d+ \(frame 1\)",
    ),
    "a guess from a later slot": (
        lambda s, l: replace(s, draft=Draft(np.roll(np.arange(l.num_slots), -1), 16)),
        "the first guess for slot 16 is the token of slot 17, which has not been sampled by then",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_schedule_that_reads_missing_keys_or_tokens_is_refused(case: str) -> None:
    """The cache would give zeros for them in silence."""
    config = replace(tiny.CONFIG, window_size=2)
    schedule = build("sequential", config.layout)
    build_program(config, schedule)
    breaks, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        build_program(config, breaks(schedule, config.layout))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_frame_before_the_frames_it_sees_is_refused_by_every_schedule(name: str) -> None:
    config = replace(tiny.CONFIG, num_frames=3, window_size=2)
    with pytest.raises(ValueError, match="neither given nor decoded by then"):
        build_program(config, SCHEDULES[name](config.layout, (0,), (2,), 2))


def test_without_the_temporal_channel_a_frame_needs_no_other() -> None:
    schedule = sequential(tiny.CONFIG.layout, (), (3,))
    assert build_program(tiny.CONFIG, schedule, temporal=False).tokens_per_clip == 16
    with pytest.raises(ValueError, match="attends to slot 0"):
        build_program(tiny.CONFIG, schedule)


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
def test_wavefront_tokens_are_those_of_sequential_decoding(
    task: ModelTask, num_frames: int, side: int, window: int, guidance_scale: float | None
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
    conditioning = Conditioning.from_tokens(
        texts,
        guides if guidance_scale else [],
        tiny.VOCABULARY.pad,
        guidance_scale=guidance_scale,
        text_bonus=0.0 if guidance_scale else 1.4,
    )
    one_by_one, several = build("sequential", layout), build("wavefront", layout, window)
    assert len(several.steps) < len(one_by_one.steps)
    engine = Engine(model)
    tokens = [
        engine.generate(build_program(config, schedule), known, conditioning, SAMPLER, uniforms)
        for schedule in (one_by_one, several)
    ]
    assert torch.equal(*tokens)
    assert len(tokens[0].unique()) > 10, "the test means nothing if all tokens are alike"


def test_given_frames_delay_no_other() -> None:
    """A clip continued from two frames: only decoded frames wait for each other."""
    layout = ClipLayout.sequential(4, 6, 4)
    steps = steps_of(wavefront(layout, (0, 1), (2, 3), 3), layout)
    assert steps[2].tolist() == list(range(36))
    assert steps[3, 0] == 2 * 7


@pytest.mark.parametrize(
    ("task", "given", "frames", "window", "regions"),
    [
        ("sequential", (0,), (1, 2, 3, 4), None, {"sequential": 1, "wavefront": 2, "speculative": 2}),
        ("interpolation", (0, 2, 4), (1, 3), 10, {"sequential": 1, "wavefront": 2, "speculative": 2}),
        ("sequential", (), (0, 1, 2, 3, 4), 5, {"sequential": 1, "wavefront": 5, "speculative": 2}),
    ],
)
def test_the_spatial_cache_has_room_for_the_frames_in_flight_only(
    task: ModelTask, given: tuple[int, ...], frames: tuple[int, ...], window: int | None, regions: dict[str, int]
) -> None:
    layout = layout_of(task, 20)
    for name in regions:
        schedule = SCHEDULES[name](layout, given, frames, window)
        positions = spatial_cache_positions(schedule, layout)
        assert (positions[schedule.given] == -1).all()
        by_frame = positions[layout.slots_of(*frames)].reshape(len(frames), 400)
        assert (by_frame % 400 == np.arange(400)).all()
        assert positions.max() + 1 == 400 * regions[name], name


def decode(model: CogVideoTransformer, schedule: Schedule, scale: float | None, known: Tensor) -> tuple[Tensor, int]:
    """Tokens of three clips, and the forward passes that they took, prefill of given frames apart."""
    engine = Engine(model)
    texts, guides = [tiny.encode(text) for text in ("left", "quickly right", "up")], [tiny.encode("any")] * 3
    conditioning = Conditioning.from_tokens(
        texts, guides if scale else [], tiny.VOCABULARY.pad, guidance_scale=scale, text_bonus=0.0 if scale else 1.4
    )
    uniforms = torch.from_numpy(np.random.default_rng(3).random((*known.shape, 2)))
    counts: list[int] = []
    program = build_program(model.config, schedule, temporal=bool(len(schedule.given)))
    tokens = engine.generate(program, known, conditioning, SAMPLER, uniforms, counts.append)
    assert sum(counts) == 3 * program.tokens_per_clip
    return tokens, engine.scheduler.forward_passes


@pytest.mark.parametrize("name", SCHEDULES)
def test_tokens_of_every_schedule_are_those_of_sequential_decoding(name: str) -> None:
    model = tiny.model("interpolation", window_size=2)
    layout = model.config.layout
    known = random_clips(layout)
    arguments = layout, layout.given_frames, layout.generation_order, 2
    expected, _ = decode(model, sequential(*arguments), 2.0, known)
    tokens, _ = decode(model, SCHEDULES[name](*arguments), 2.0, known)
    assert torch.equal(tokens, expected)


def random_clips(layout: ClipLayout) -> Tensor:
    return torch.from_numpy(np.random.default_rng(4).integers(tiny.NUM_CODES, size=(3, layout.num_slots)))


@pytest.mark.parametrize(("task", "window_size"), [("sequential", None), ("sequential", 2), ("interpolation", 2)])
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("draft_window", [1, 3, 16])
def test_speculative_tokens_are_those_of_sequential_decoding(
    task: ModelTask, window_size: int | None, scale: float | None, draft_window: int
) -> None:
    model = tiny.model(task, window_size)
    layout = model.config.layout
    known = random_clips(layout)
    expected, _ = decode(model, build("sequential", layout), scale, known)
    drafted = speculative(layout, layout.given_frames, layout.generation_order, draft_window=draft_window)
    tokens, _ = decode(model, drafted, scale, known)
    assert torch.equal(tokens, expected)
    assert len(expected.unique()) > 10, "the test means nothing if all tokens are alike"


def test_a_speculative_first_frame_has_the_same_tokens() -> None:
    """Its first forward pass brings the text as well as a window of guesses."""
    model, known = tiny.model("sequential"), torch.zeros(3, 16, dtype=torch.int64)
    layout = model.config.layout
    expected, _ = decode(model, sequential(layout, (), (0,)), None, known)
    assert torch.equal(decode(model, speculative(layout, (), (0,)), None, known)[0], expected)


def test_right_guesses_save_forward_passes() -> None:
    """If tokens depend on nothing but their own random numbers, a window is known after its second forward pass."""
    model = tiny.model("interpolation", 2)
    with torch.no_grad():
        model.final_layernorm.weight.zero_()
    layout = model.config.layout
    known = torch.zeros(3, layout.num_slots, dtype=torch.int64)
    drafted = speculative(layout, layout.given_frames, layout.generation_order, draft_window=8)
    tokens, passes = decode(model, drafted, None, known)
    expected, steps = decode(model, build("sequential", layout), None, known)
    assert torch.equal(tokens, expected)
    assert steps == 32
    assert passes <= 8


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_speculative_tokens_are_the_same_with_weights_of_fewer_bits(dtype: WeightName) -> None:
    model = tiny.model("sequential")
    convert_weights(model, dtype)
    layout = model.config.layout
    known = random_clips(layout)
    expected, _ = decode(model, build("sequential", layout), 3.0, known)
    assert torch.equal(decode(model, build("speculative", layout), 3.0, known)[0], expected)
