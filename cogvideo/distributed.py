"""Sampling and preparing in many processes: who takes what, and who waits for whom. One process knows of no other.

Processes never talk about tokens: each makes its own part, which depends on no other's, and leaves it in a folder that
they share. They meet twice, before the work and after it, on CPUs (gloo). Training's are `training/processes.py`.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long the first to be done waits for the others; a launcher ends all when one fails."""
FOUND_BY = timedelta(minutes=20)
"""How long a process looks for the others at the start: they may have weights to load still."""


@dataclass(frozen=True)
class Processes:
    """This process among those that a launcher (torchrun, deepspeed) started."""

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Raises: ValueError if a launcher's variables do not fit together."""
        rank, count = (os.environ.get(name) or default for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
            raise ValueError(f"RANK={rank} WORLD_SIZE={count} do not name a process; start with torchrun or deepspeed")
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if int(count) > 1 and not (address and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(
                f"WORLD_SIZE={count}, but MASTER_ADDR={address} MASTER_PORT={port}; start with torchrun or deepspeed"
            )
        return cls(int(rank), int(count))

    def share(self, num_items: int) -> range:
        """This process's part of 0 .. num_items - 1: every count-th."""
        return range(self.rank, num_items, self.count)

    def first_does(self, work: Callable[[], T]) -> T:
        """Process 0 does it while the others wait; all get its result, which is not None.

        Raises: what `work` raised, in process 0; the others then leave with exit code 2 and no words.
        ConnectionError if one is gone.
        """
        if self.count == 1:
            return work()
        self._meet()
        if self.rank:
            answer: list[T | None] = [None]
            with self._told():
                dist.broadcast_object_list(answer)
            if answer[0] is None:
                raise SystemExit(2)
            return answer[0]
        result: T | None = None
        try:
            result = work()
        finally:
            with self._told():
                dist.broadcast_object_list([result])
        return result

    def wait_for_all(self) -> None:
        """Raises: ConnectionError if one is gone."""
        if self.count > 1:
            self._meet()
            with self._told():
                barrier = dist.barrier(async_op=True)
                while not barrier.is_completed():  # not wait(), which hears no signal
                    time.sleep(0.1)
                barrier.wait()

    def part(self) -> None:
        """Let go of the others; nothing can be waited for any more."""
        if self.count > 1 and dist.is_initialized():  # a process alone made no group: one there is a caller's own
            dist.destroy_process_group()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in a line that another process is gone: a connection to it breaks at once."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"process {self.rank} of {self.count} has lost another ({reason})") from None

    def _meet(self) -> None:
        """Raises: ConnectionError if the others are not to be found."""
        if dist.is_initialized():
            return
        try:
            store, rank, count = next(dist.rendezvous("env://", self.rank, self.count, timeout=FOUND_BY))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"process {self.rank} of {self.count} cannot find the others ({reason})") from None
