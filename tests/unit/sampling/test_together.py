"""Threads that decode with one model share forwards, whatever each is at, and draw what they draw alone."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.model.plan import plan_forward
from cogvideo.model.transformer import CogVideoTransformer, Step
from cogvideo.sampling import schedules
from cogvideo.sampling.draw import ClusterDraw
from cogvideo.sampling.engine import Conditioning, compile_program, generate
from cogvideo.sampling.speculative import speculative
from cogvideo.sampling.together import Together
from cogvideo.sampling.wavefront import wavefront
from tests.unit.sampling import tiny


class Watched(Together):
    """Remembers how many threads shared each forward."""

    def __init__(self, model: CogVideoTransformer) -> None:
        super().__init__(model)
        self.shared: list[int] = []

    def _answer(self, asked: list) -> None:
        self.shared.append(len(asked))
        super()._answer(asked)


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


def test_an_error_reaches_all_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("sequential")
    monkeypatch.setattr(CogVideoTransformer, "decode", lambda self, steps: 1 / 0)
    meeting, errors, ready = Together(model), list[Exception](), threading.Barrier(3)

    def ask() -> None:
        with meeting.joined():
            ready.wait()
            try:
                nothing = torch.zeros(1, 1, dtype=torch.int64)
                meeting.logits(Step(nothing, plan_forward(model.config), None, None))  # type: ignore[arg-type]
            except ZeroDivisionError as error:
                errors.append(error)

    run_all([ask] * 3)
    assert len(errors) == 3


def test_who_leaves_is_not_waited_for() -> None:
    """A member that ends without another step lets the others go on."""
    model = tiny.model("sequential")
    meeting, leaves, made = Watched(model), threading.Event(), list[Tensor]()

    def leave() -> None:
        with meeting.joined():
            leaves.wait()

    def work() -> None:
        made.append(request(0, model)(meeting))

    leaver, worker = threading.Thread(target=leave), threading.Thread(target=work)
    leaver.start()
    while not meeting._members:
        pass
    worker.start()
    leaves.set()
    worker.join(timeout=60)
    leaver.join(timeout=60)
    assert torch.equal(made[0], request(0, model)(None))
