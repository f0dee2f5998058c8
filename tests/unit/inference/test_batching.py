"""Threads that decode with one model share forward passes and get the tokens that they get alone."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.inference.batching import BatchScheduler, Decoding
from cogvideo.inference.engine import Conditioning, Engine, build_program
from cogvideo.inference.sampler import ClusterSampler, TokenSampler
from cogvideo.inference.schedules import SCHEDULES
from cogvideo.model.inputs import DecodeInputs
from cogvideo.model.transformer import CogVideoTransformer
from tests.helpers import decoding as tiny


def request(number: int, model: CogVideoTransformer, sampler: TokenSampler | None = None) -> Callable[[Engine], Tensor]:
    """Batches of different sizes, texts, schedules, guidance and settings."""
    layout, window = model.config.layout, model.config.window_size
    build_schedule = list(SCHEDULES.values())[number % len(SCHEDULES)]
    schedule = build_schedule(layout, layout.given_frames, layout.generation_order, window)
    program = build_program(model.config, schedule)
    rng, clips = np.random.default_rng(number), 1 + number % 2
    known = torch.from_numpy(rng.integers(tiny.NUM_CODES, size=(clips, layout.num_slots)))
    uniforms = torch.from_numpy(rng.random((clips, layout.num_slots, 2)))
    scale = None if number % 2 else 3.0
    texts = [tiny.encode("left " * (number + 1))] * clips
    guides = [tiny.encode("any")] * clips if scale is not None else []
    conditioning = Conditioning.from_tokens(texts, guides, tiny.VOCABULARY.pad, guidance_scale=scale, text_bonus=0.5)
    sampler = sampler or ClusterSampler(np.arange(tiny.NUM_CODES) % 12, 1.0, 4 + number, 0.9)
    return lambda engine: engine.generate(program, known, conditioning, sampler, uniforms)


def run_all(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread never ends"


@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_shared_passes_give_the_tokens_of_a_request_alone(task: str) -> None:
    model = tiny.model(task, window_size=2)  # type: ignore[arg-type]
    requests = [request(number, model) for number in range(5)]
    alone = [one(Engine(model)) for one in requests]
    engine, shared, sampled = Engine(model), list[int](), dict[int, Tensor]()

    def decode(steps: Sequence[DecodeInputs]) -> list[Tensor | Exception]:
        shared.append(len(steps))
        return engine.backend.decode(steps)

    engine.scheduler = BatchScheduler(decode)
    run_all([lambda i=i, one=one: sampled.update({i: one(engine)}) for i, one in enumerate(requests)])
    for i, tokens in enumerate(alone):
        assert torch.equal(sampled[i], tokens)
    assert max(shared) > 1, "the test means nothing if no pass was shared"
    assert engine.scheduler.forward_passes == len(shared)


class FailingSampler(ClusterSampler):
    """Fails in the fifth step."""

    def __init__(self) -> None:
        super().__init__(np.arange(tiny.NUM_CODES) % 12, 1.0, 4, 0.9)
        self.calls = 0

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5:
            raise ZeroDivisionError
        return super().__call__(logits, uniforms)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_an_error_in_the_draw_of_a_shared_pass_ends_its_own_request_only(backend: str) -> None:
    model = tiny.model("sequential", window_size=2)
    requests, failing = [request(number, model) for number in (0, 3, 6)], request(0, model, FailingSampler())
    alone = [one(Engine(model, backend)) for one in requests]
    engine, shared, sampled, errors = Engine(model, backend), list[int](), dict[int, Tensor](), list[Exception]()

    def decode(steps: Sequence[DecodeInputs]) -> list[Tensor | Exception]:
        results = engine.backend.decode(steps)
        shared.extend(len(steps) for result in results if isinstance(result, Exception))
        return results

    def fail() -> None:
        try:
            failing(engine)
        except ZeroDivisionError as error:
            errors.append(error)

    engine.scheduler = BatchScheduler(decode)
    run_all([*(lambda i=i, one=one: sampled.update({i: one(engine)}) for i, one in enumerate(requests)), fail])
    assert len(errors) == len(shared) == 1 and shared[0] > 1, "the test means nothing if the pass was not shared"
    assert all(torch.equal(sampled[i], tokens) for i, tokens in enumerate(alone))


def two_steps(after_each: Callable[[], object]) -> Decoding:
    """A decoding for a scheduler that runs no model."""
    for _ in range(2):
        yield DecodeInputs(*[None] * 5)  # type: ignore[arg-type]
        after_each()


class Scheduler(BatchScheduler):
    """Runs no model, and records how each of `number` threads ended, which all start at once."""

    def __init__(self, number: int) -> None:
        super().__init__(lambda steps: [torch.zeros(1)] * len(steps))
        self.start = threading.Barrier(number)
        self.errors: dict[str, BaseException | None] = {}

    def run_thread(self, name: str, after_each: Callable[[], object] = lambda: None) -> None:
        self.start.wait()
        try:
            self.run(two_steps(after_each))
            self.errors[name] = None
        except BaseException as error:
            self.errors[name] = error


def test_an_error_of_the_forward_pass_reaches_all_requests_in_it() -> None:
    scheduler, errors = BatchScheduler(lambda steps: 1 / 0), list[Exception]()  # type: ignore[arg-type, return-value]

    def run() -> None:
        try:
            scheduler.run(two_steps(lambda: None))
        except ZeroDivisionError as error:
            errors.append(error)

    run_all([run] * 3)
    assert len(errors) == 3


def test_an_error_in_sampling_ends_its_own_request_only() -> None:
    scheduler = Scheduler(4)
    others = [lambda name=name: scheduler.run_thread(name) for name in "abc"]
    run_all([*others, lambda: scheduler.run_thread("failing", lambda: 1 / 0)])
    assert isinstance(scheduler.errors.pop("failing"), ZeroDivisionError)
    assert scheduler.errors == dict.fromkeys("abc")


def test_a_thread_interrupted_while_waiting_leaves_no_request_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(1)
    leads, may_continue = threading.Event(), threading.Event()

    def hold() -> None:
        leads.set()
        assert may_continue.wait(60)

    leader = threading.Thread(target=lambda: scheduler.run_thread("leader", hold))
    leader.start()
    assert leads.wait(60)

    def interrupted(timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler._changed, "wait", interrupted)
    scheduler.run_thread("waiter")
    assert isinstance(scheduler.errors["waiter"], KeyboardInterrupt) and len(scheduler._requests) == 1
    may_continue.set()
    leader.join(timeout=60)
    assert scheduler.errors["leader"] is None and not scheduler._requests


def test_a_thread_interrupted_while_leading_hands_over() -> None:
    """The next thread computes the others' steps, and none waits for ever."""
    scheduler = Scheduler(4)

    def interrupt() -> None:
        raise KeyboardInterrupt

    others = [lambda name=name: scheduler.run_thread(name) for name in "abc"]
    run_all([*others, lambda: scheduler.run_thread("interrupted", interrupt)])
    assert isinstance(scheduler.errors["interrupted"], KeyboardInterrupt)
    finished = sum(error is None for error in scheduler.errors.values())
    assert finished >= 2, "only the leading thread may be interrupted as well"
