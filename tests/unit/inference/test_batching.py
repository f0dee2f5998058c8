"""Threads that decode with one model share forwards, whatever each is at, and draw what they draw alone."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.inference import schedules
from cogvideo.inference.batching import Decoding, Together
from cogvideo.inference.engine import Conditioning, compile_program, generate
from cogvideo.inference.sampler import ClusterDraw
from cogvideo.inference.speculative import speculative
from cogvideo.inference.wavefront import wavefront
from cogvideo.model.transformer import CogVideoTransformer, Step
from tests.helpers import decoding as tiny


class Watched(Together):
    """Remembers how many threads shared each forward."""

    def __init__(self, model: CogVideoTransformer) -> None:
        super().__init__(model)
        self.shared: list[int] = []

    def _answer(self, steps: Sequence[Step]) -> list[Tensor]:
        self.shared.append(len(steps))
        return super()._answer(steps)


def request(number: int, model: CogVideoTransformer) -> Callable[[Together | None], Tensor]:
    """Batches of different sizes, texts, schedules, guidance and settings."""
    layout, window = model.config.layout, model.config.window_size
    plain = schedules.sequential(layout, layout.given_frames, layout.generation_order)
    schedule = [plain, wavefront(plain, layout, window), speculative(plain, layout, 8)][number % 3]
    program = compile_program(model.config, schedule)
    rng, clips = np.random.default_rng(number), 1 + number % 2
    known = torch.from_numpy(rng.integers(tiny.NUM_CODES, size=(clips, layout.num_slots)))
    uniforms = torch.from_numpy(rng.random((clips, layout.num_slots, 2)))
    scale = None if number % 2 else 3.0
    texts = [tiny.encode("left " * (number + 1))] * clips
    guides = [tiny.encode("any")] * clips if scale is not None else []
    conditioning = Conditioning.of(texts, guides, tiny.VOCABULARY.pad, guidance_scale=scale, text_bonus=0.5)
    draw = ClusterDraw(np.arange(tiny.NUM_CODES) % 12, 1.0, 4 + number, 0.9)
    return lambda together: generate(model, program, known, conditioning, draw, uniforms, together=together)


def run_all(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread waits for ever"


@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_the_same_tokens_as_alone(task: str) -> None:
    model = tiny.model(task, window_size=2)  # type: ignore[arg-type]
    requests = [request(number, model) for number in range(5)]
    alone = [one(None) for one in requests]
    meeting, made = Watched(model), dict[int, Tensor]()
    run_all([lambda i=i, one=one: made.update({i: one(meeting)}) for i, one in enumerate(requests)])
    for i, tokens in enumerate(alone):
        assert torch.equal(made[i], tokens)
    assert max(meeting.shared) > 1, "the test means nothing if no two ever met"


def one_step(model: CogVideoTransformer, then: Callable[[], object]) -> Decoding:
    """A decoding that asks for nothing real, twice: for use where the model is not asked."""
    nothing = Step(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1), None, None, None)  # type: ignore[arg-type]
    for _ in range(2):
        yield nothing
        then()


class Scripted(Together):
    """Answers without a model, once `number` threads are here."""

    def __init__(self, model: CogVideoTransformer, number: int) -> None:
        super().__init__(model)
        self.here = threading.Barrier(number)

    def _answer(self, steps: Sequence[Step]) -> list[Tensor]:
        return [torch.zeros(1)] * len(steps)

    def ended_by(self, then: Callable[[], object], errors: dict[str, BaseException | None], name: str) -> None:
        self.here.wait()
        try:
            self.run(one_step(self.model, then))
            errors[name] = None
        except BaseException as error:
            errors[name] = error


def test_a_forwards_error_reaches_all_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("sequential")
    monkeypatch.setattr(CogVideoTransformer, "decode", lambda self, steps: 1 / 0)
    meeting, errors = Together(model), list[Exception]()

    def ask() -> None:
        try:
            meeting.run(one_step(model, lambda: None))
        except ZeroDivisionError as error:
            errors.append(error)

    run_all([ask] * 3)
    assert len(errors) == 3


def test_an_error_in_drawing_is_that_threads_alone() -> None:
    meeting, errors = Scripted(tiny.model("sequential"), 4), dict[str, BaseException | None]()
    fine = [lambda name=name: meeting.ended_by(lambda: None, errors, name) for name in "abc"]
    run_all([*fine, lambda: meeting.ended_by(lambda: 1 / 0, errors, "wrong")])
    assert isinstance(errors.pop("wrong"), ZeroDivisionError)
    assert errors == dict.fromkeys("abc")


def test_who_is_interrupted_while_it_waits_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting, errors = Scripted(tiny.model("sequential"), 1), dict[str, BaseException | None]()
    leads, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        leads.set()
        assert goes_on.wait(60)

    leader = threading.Thread(target=lambda: meeting.ended_by(hold, errors, "leader"))
    leader.start()
    assert leads.wait(60)

    def interrupted(timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(meeting._changed, "wait", interrupted)
    meeting.ended_by(lambda: None, errors, "waiter")
    assert isinstance(errors["waiter"], KeyboardInterrupt) and len(meeting._tasks) == 1
    goes_on.set()
    leader.join(timeout=60)
    assert errors["leader"] is None and not meeting._tasks


def test_who_is_interrupted_while_it_leads_hands_on() -> None:
    """The others' steps are made by the next thread, and none waits for ever."""
    meeting, errors = Scripted(tiny.model("sequential"), 4), dict[str, BaseException | None]()

    def interrupt() -> None:
        raise KeyboardInterrupt

    fine = [lambda name=name: meeting.ended_by(lambda: None, errors, name) for name in "abc"]
    run_all([*fine, lambda: meeting.ended_by(interrupt, errors, "interrupted")])
    assert isinstance(errors["interrupted"], KeyboardInterrupt)
    assert sum(error is None for error in errors.values()) >= 2, "whoever led is interrupted too, nobody else"
