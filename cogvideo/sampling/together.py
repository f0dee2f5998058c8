"""Threads that decode with one model at the same time share their forwards: its weights are read once for all.

So a prompt that comes while others are being drawn begins at their next step instead of behind them. Each keeps its own
cache, text, schedule and settings; what is drawn does not change, but for float rounding in large batches. Reading the
weights is all that is saved: caches are read, and tokens drawn, for each by itself (docs/results.md, late4).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cogvideo.model.transformer import CogVideoTransformer, Step


class _Asked:
    """A thread's step, and what came of it."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.logits: Tensor | None = None
        self.error: BaseException | None = None


class Together:
    """The meeting place of one model's decoding threads. One thread alone is never kept waiting."""

    def __init__(self, model: CogVideoTransformer) -> None:
        self.model = model
        self._changed = threading.Condition()
        self._members = 0
        self._asked: list[_Asked] = []

    @contextmanager
    def joined(self) -> Iterator[None]:
        """While the calling thread decodes: the others wait for its steps."""
        with self._changed:
            self._members += 1
        try:
            yield
        finally:
            with self._changed:
                self._members -= 1
                self._changed.notify_all()

    def logits(self, step: Step) -> Tensor:
        """Scores of the step's rows, (batch, rows, image tokens), once all that have joined ask for theirs."""
        own = _Asked(step)
        with self._changed:
            self._asked.append(own)
            while own.logits is None and own.error is None:
                if len(self._asked) >= self._members:
                    asked, self._asked = self._asked, []
                    self._answer(asked)
                    self._changed.notify_all()
                else:
                    self._changed.wait()
        if own.error is not None:
            raise own.error
        assert own.logits is not None
        return own.logits

    def _answer(self, asked: list[_Asked]) -> None:
        """One forward for all; whatever goes wrong, nobody waits for ever."""
        try:
            hidden = self.model.decode([one.step for one in asked])
            rows = [part.shape[0] * part.shape[1] for part in hidden]
            logits = self.model.logits(torch.cat([part.flatten(0, 1) for part in hidden])).split(rows)
            for one, part, own in zip(asked, hidden, logits, strict=True):
                one.logits = own.view(*part.shape[:2], -1)
        except BaseException as error:
            for one in asked:
                one.error = error
