"""Heartbeats between the processes of a run: if one is lost, the others end with one line, even in a collective.

gloo reports a broken connection at once. NCCL does not: a collective whose peer is gone waits until its timeout and
then aborts the process with a long report. So a thread in each process increments a key in the group's store and reads
the other processes' keys. A process whose key stops changing is lost; one that is busy still increments its key.
"""

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

SILENT_SECONDS = 60.0
"""A process counts as lost after this long without a heartbeat, or deepspeed.timeout_minutes if that is shorter."""
POLLS = 12
"""Number of polls without a heartbeat after which a process counts as lost."""
GRACE_SECONDS = 10.0
"""How long the main thread may take to report the same loss itself, as it does with gloo."""
DONE, FAILED = b"done", b"failed"

_runs = itertools.count()


class Heartbeat:
    """Use as a context manager around a run, in every process. Does nothing if there is only one."""

    def __init__(self, timeout_seconds: float, advice: Callable[[], str]) -> None:
        """`advice()` returns the end of the line that reports a lost process."""
        self._limit = min(timeout_seconds, SILENT_SECONDS)
        self._interval = self._limit / POLLS
        self._advice = advice
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._stop = threading.Event()
        self._final_state = DONE
        self._polls, self._seen = 0, list[bytes]()
        self._store_error: str | None = None

    def __enter__(self) -> "Heartbeat":
        if self._size > 1:
            run = next(_runs)  # a process may train twice; all processes count the same runs
            self._keys = [f"alive/{run}/{rank}" for rank in range(self._size)]
            # a separate connection, since the main thread may block the group's
            group_store: Any = dist.distributed_c10d._get_default_store()
            self._store = group_store.clone()
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._poll, self._watch)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._size > 1:
            self._final_state = DONE if error is None else FAILED
            self._stop.set()
            self._threads[0].join(self._interval + 1)

    def _poll(self) -> None:
        """Increment this process's key and read all keys, until the run ends."""
        own, beat = self._keys[self._rank], 0
        try:
            while not self._stop.is_set():
                beat += 1
                self._store.set(own, str(beat))
                self._seen = self._read()
                self._polls += 1
                self._stop.wait(self._interval)
            self._store.set(own, self._final_state)
        except RuntimeError as error:  # the connection to rank 0 failed
            self._store_error = (str(error).splitlines() or ["no connection"])[0][:160]

    def _read(self) -> list[bytes]:
        """What each process wrote last; empty if it has not written yet, in which case it may already be lost."""
        if self._store.check(self._keys):
            return self._store.multi_get(self._keys)
        return [self._store.get(key) if self._store.check([key]) else b"" for key in self._keys]

    def _watch(self) -> None:
        """End the process if another one is lost and the main thread does not end by itself.

        Time is counted in iterations of this loop, so that no process counts as lost after the whole run was suspended.
        """
        silent, before, polls, stuck = [0] * self._size, list[bytes](), 0, 0
        while not self._stop.wait(self._interval):
            stuck = 0 if self._polls > polls else stuck + 1
            if self._polls > polls:
                polls, seen = self._polls, self._seen
                changed = [not seen or not before or seen[rank] != before[rank] for rank in range(self._size)]
                silent = [0 if changed[rank] else count + 1 for rank, count in enumerate(silent)]
                before = seen
            loss = self._loss(silent, before, stuck)
            if loss is not None and not self._stop.wait(min(GRACE_SECONDS, self._limit)):
                with contextlib.suppress(OSError):
                    line = f"rank {self._rank} lost another process ({loss}); {self._advice()}"
                    print(f"cogvideo: error: {line}", file=sys.stderr, flush=True)
                os._exit(2)  # the main thread may be stuck in NCCL

    def _loss(self, silent: list[int], seen: list[bytes], stuck: int) -> str | None:
        """Which process is lost and how that was noticed; None if none is."""
        is_done = bool(seen) and seen[0] == DONE
        if not is_done and (self._store_error is not None or stuck >= POLLS):
            no_answer = f"no answer from rank 0 for {self._limit:g} s"
            return no_answer if self._store_error is None else f"rank 0 does not answer: {self._store_error}"
        for rank, count in enumerate(silent):
            if rank == self._rank or not seen or seen[rank] == DONE:
                continue
            if seen[rank] == FAILED:
                return f"rank {rank} failed, see its error message"
            if count >= POLLS:
                return f"no heartbeat from rank {rank} for {self._limit:g} s"
        return None
