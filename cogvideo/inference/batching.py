"""Continuous batching: threads that decode with one model share forward passes, so weights are read once for all.

A prompt that arrives while others are being decoded joins them at their next step instead of waiting for them to
finish. Each request keeps its own cache, text, schedule and settings. Its tokens do not change, except by float
rounding in large batches. One of the threads computes the steps of all requests; the others sleep.
"""

import threading
from collections.abc import Callable, Generator, Sequence

from torch import Tensor

from cogvideo.model.inputs import DecodeInputs

Decoding = Generator[DecodeInputs, Tensor, None]
"""Yields the inputs of each step and is sent the result, see `DecodeInputs.finish`."""


class _Request:
    """A thread's decoding, advanced to its next step."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.step = next(decoding, None)
        """None: finished."""
        self.error: BaseException | None = None

    def advance(self, result: Tensor) -> None:
        """Go on to the next step. An error ends this request only; interrupts are also re-raised here."""
        try:
            self.step = self.decoding.send(result)
        except StopIteration:
            self.step = None
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise

    def fail(self, error: BaseException) -> None:
        self.step, self.error = None, error


class BatchScheduler:
    """Runs the decodings of several threads together. A lone thread never waits."""

    def __init__(self, forward: Callable[[Sequence[DecodeInputs]], Sequence[Tensor | Exception]]) -> None:
        """`forward` computes the results of several steps. An error returned in place of a result ends that request;
        an error that it raises ends every request in the pass."""
        self._forward = forward
        self.forward_passes = 0
        """Passes so far; one shared by several requests counts once."""
        self._changed = threading.Condition()
        self._requests: list[_Request] = []
        self._leader: _Request | None = None

    def run(self, decoding: Decoding) -> None:
        """Decode to the end, in this thread or in one that is already decoding. Raises: the error that ended it."""
        own = _Request(decoding)
        try:
            with self._changed:
                self._requests.append(own)
                while own.step is not None and self._leader is not None:
                    self._changed.wait()
                if own.step is not None:
                    self._leader = own
            while own.step is not None:
                self._advance()
        finally:  # also after an interrupt: another thread then leads and repeats the step, with the same result
            with self._changed:
                self._requests = [request for request in self._requests if request is not own]
                if self._leader is own:
                    self._leader = None
                self._changed.notify_all()
        error, own.error = own.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback keeps this frame alive, and with it the memory of the decoding

    def _advance(self) -> None:
        """Run the next step of all pending requests."""
        with self._changed:
            requests = [request for request in self._requests if request.step is not None]
        self.forward_passes += 1
        try:
            results = self._forward([request.step for request in requests if request.step is not None])
        except Exception as error:
            for request in requests:
                request.fail(error)
        else:
            for request, result in zip(requests, results, strict=True):
                if isinstance(result, Exception):
                    request.fail(result)
                else:
                    request.advance(result)
        if any(request.step is None for request in requests):
            with self._changed:
                self._changed.notify_all()
