"""Threads that decode with one model at the same time share their forwards: its weights are read once for all.

So a prompt that comes while others are being drawn begins at their next step instead of behind them. Each keeps its own
cache, text, schedule and settings; what is drawn does not change, but for float rounding in large batches. One of the
threads makes every step of all, and the others sleep.
"""

import threading
from collections.abc import Generator, Sequence

from torch import Tensor

from cogvideo.model.transformer import CogVideoTransformer, Step

Decoding = Generator[Step, Tensor, None]
"""Yields what is to be computed next, is sent the scores (batch, rows, image tokens), and draws."""


class _Task:
    """A thread's decoding, up to its next step."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.step = next(decoding, None)
        """None: there is no more to come."""
        self.error: BaseException | None = None

    def take(self, logits: Tensor) -> None:
        """Go on to the next step. What goes wrong is the thread's own business; only interrupts are everyone's."""
        try:
            self.step = self.decoding.send(logits)
        except StopIteration:
            self.step = None
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise

    def fail(self, error: BaseException) -> None:
        self.step, self.error = None, error


class Together:
    """The meeting place of one model's decoding threads. One thread alone is never kept waiting."""

    def __init__(self, model: CogVideoTransformer) -> None:
        self.model = model
        self.forwards = 0
        """Of decoding so far, each for all that shared it; prefill apart."""
        self._changed = threading.Condition()
        self._tasks: list[_Task] = []
        self._leader: _Task | None = None

    def run(self, decoding: Decoding) -> None:
        """Decode to the end, in this thread or in another that does so already. Raises: what the decoding raises."""
        own = _Task(decoding)
        try:
            with self._changed:
                self._tasks.append(own)
                while own.step is not None and self._leader is not None:
                    self._changed.wait()
                if own.step is not None:
                    self._leader = own
            while own.step is not None:
                self._advance()
        finally:  # of an interrupt, too: another thread then leads, and makes the step anew, with the same outcome
            with self._changed:
                self._tasks = [task for task in self._tasks if task is not own]
                if self._leader is own:
                    self._leader = None
                self._changed.notify_all()
        if own.error is not None:
            raise own.error

    def _advance(self) -> None:
        """One step of all that are here."""
        with self._changed:
            tasks = [task for task in self._tasks if task.step is not None]
        try:
            answers = self._answer([task.step for task in tasks if task.step is not None])
        except Exception as error:
            for task in tasks:
                task.fail(error)
        else:
            for task, logits in zip(tasks, answers, strict=True):
                task.take(logits)
        if any(task.step is None for task in tasks):
            with self._changed:
                self._changed.notify_all()

    def _answer(self, steps: Sequence[Step]) -> list[Tensor]:
        """One forward for all: scores of each step's rows, (batch, rows, image tokens)."""
        self.forwards += 1
        return self.model.decode(steps)
