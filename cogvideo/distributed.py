"""Several processes of one command: ranks, barriers, how a failure on one rank reaches the others, device choice.

`ProcessGroup` serves sampling and data preparation, where ranks work independently and synchronise on the CPU (gloo)
before and after the work. The functions below it serve training, whose process group DeepSpeed creates.
"""

import contextlib
import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

BARRIER_TIMEOUT = timedelta(days=30)
"""How long the first rank to finish waits for the others; a launcher stops all ranks when one fails."""
RENDEZVOUS_TIMEOUT = timedelta(minutes=20)
"""How long a rank waits for the others to connect; they may still be loading weights."""

CHOOSE_PORT = "choose another by deepspeed --master_port N, torchrun --master-port N or MASTER_PORT=N"

RESOLVE_SECONDS = 15.0
"""How long to wait for a host name to resolve: in a cluster that has just started, names may appear late."""

LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset)|socket|timed? ?out|peer", re.IGNORECASE)
"""Matches messages of torch.distributed errors that mean a lost process."""
_barriers = itertools.count()


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that a launcher (torchrun, deepspeed) started, as seen from this one; by default only this one."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> "ProcessGroup":
        """Read RANK and WORLD_SIZE.

        Raises: ValueError if the launcher's variables contradict each other.
        """
        rank, size = (os.environ.get(name) or default for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise ValueError(f"RANK={rank} WORLD_SIZE={size} is not a valid rank; start with torchrun or deepspeed")
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if int(size) > 1 and not (address and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(
                f"WORLD_SIZE={size}, but MASTER_ADDR={address} MASTER_PORT={port}; start with torchrun or deepspeed"
            )
        return cls(int(rank), int(size))

    def shard(self, num_items: int) -> range:
        """Indices of this rank's items out of `num_items`: rank r takes every size-th, starting at r."""
        return range(self.rank, num_items, self.size)

    def broadcast_from_rank_0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 while the others wait, and return its result (never None) on every rank.

        Raises: on rank 0 whatever `work` raises; the other ranks then exit with code 2 and print nothing.
        ConnectionError if a process is lost.
        """
        if self.size == 1:
            return work()
        self._connect()
        if self.rank:
            received: list[T | None] = [None]
            with self._lost_peer_as_error():
                dist.broadcast_object_list(received)
            if received[0] is None:
                raise SystemExit(2)
            return received[0]
        result: T | None = None
        try:
            result = work()
        finally:
            with self._lost_peer_as_error():
                dist.broadcast_object_list([result])
        return result

    def barrier(self) -> None:
        """Wait until every rank has called this.

        Raises: ConnectionError if a process is lost.
        """
        if self.size > 1:
            self._connect()
            with self._lost_peer_as_error():
                work = dist.barrier(async_op=True)
                while not work.is_completed():  # wait() would keep signal handlers from running
                    time.sleep(0.1)
                work.wait()

    def close(self) -> None:
        """Destroy the process group; no barrier is possible afterwards."""
        if self.size > 1 and dist.is_initialized():  # a single process created none: an existing one is the caller's
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _lost_peer_as_error(self) -> Iterator[None]:
        """Turn any error of a collective into one line: here it always means that a process is gone."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"rank {self.rank} of {self.size} lost another process ({reason})") from None

    def _connect(self) -> None:
        """Raises: ConnectionError if the other ranks do not connect in time."""
        if dist.is_initialized():
            return
        with connecting():
            store, rank, size = next(rendezvous("env://", self.rank, self.size, timeout=RENDEZVOUS_TIMEOUT))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=BARRIER_TIMEOUT)


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """Context for setting up a process group. Signals in it end the process at once, as torch waits outside Python.

    Raises: ConnectionError in one line if the processes do not meet, for example because the port is taken; ValueError
    for an invalid port.
    """
    rank, size, address, port = (
        os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    if not (port.isdecimal() and int(port) < 65536):
        raise ValueError(f"MASTER_PORT={port} is not a valid port; {CHOOSE_PORT}")
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, signal.SIG_DFL)
    try:
        _resolve(address)
        yield
    except dist.DistError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "EADDRINUSE" in reason:
            reason = f"MASTER_PORT={port} is taken by another program; {CHOOSE_PORT}"
        elif "EACCES" in reason:
            reason = f"MASTER_PORT={port} is a privileged port; {CHOOSE_PORT}"
        else:
            reason = f"MASTER_ADDR={address} MASTER_PORT={port}: {reason}"
        raise ConnectionError(f"rank {rank} of {size} cannot reach the others: {reason}") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _resolve(address: str) -> None:
    """Wait until MASTER_ADDR resolves. Raises: ConnectionError if it does not soon: torch would try for minutes."""
    deadline = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                reason = error.strerror if isinstance(error, OSError) else "not a valid host name"
                raise ConnectionError(
                    f"MASTER_ADDR={address} cannot be resolved ({reason}); give the name or address of rank 0's machine"
                ) from None
        time.sleep(1)


def store_barrier() -> None:
    """Wait until every rank has called this, through the group's store.

    Unlike a collective, it does not time out while one rank is still working (`Heartbeat` detects a lost rank).
    Raises: RuntimeError, as collectives do, if rank 0 is lost.
    """
    if dist.get_world_size() == 1:
        return
    store, key, pause = dist.distributed_c10d._get_default_store(), f"barrier/{next(_barriers)}", 0.001
    store.add(key, 1)
    while store.add(key, 0) < dist.get_world_size():
        time.sleep(pause)
        pause = min(1.5 * pause, 0.2)


def run_on_all_ranks(work: Callable[[], T] | None) -> list[T | None]:
    """Run each rank's `work` (None: nothing to do on this rank) and return all results, indexed by rank.

    If one rank fails, all ranks raise, so that none is left waiting in a collective.
    Raises: OSError on every rank if any rank raised one.
    """
    result: T | None = None
    failure: tuple[int | None, str, str | None] | None = None
    try:
        result = work() if work is not None else None
    except OSError as error:
        failure = (error.errno, error.strerror or str(error), None if error.filename is None else str(error.filename))
    outcomes: list[Any] = [(result, failure)]
    if dist.get_world_size() > 1:
        store_barrier()
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, failure))
    for _, problem in outcomes:
        if problem is not None:
            raise OSError(*problem) if problem[0] is not None else OSError(problem[1])
    return [value for value, _ in outcomes]


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest `number` of any rank, up to 2**24; every rank must call this."""
    if dist.get_world_size() == 1:
        return number
    numbers = torch.tensor([float(number)], device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers.item())


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank; every rank must call this."""
    return bool(max_over_ranks(flag, device))


@contextlib.contextmanager
def lost_peer_as_error(advice: Callable[[], str]) -> Iterator[None]:
    """Turn torch's report of a lost process into a one-line ConnectionError that ends with `advice()`."""
    try:
        yield
    except RuntimeError as error:
        if dist.get_world_size() == 1 or not LOST_PEER.search(str(error)):
            raise
        reason = (str(error).splitlines() or [""])[0][:160]
        raise ConnectionError(f"rank {dist.get_rank()} lost another process ({reason}); {advice()}") from error


def open_device(name: str) -> torch.device:
    """The device called `name`; `auto` gives each local process its own GPU, or the CPU where there is none.

    Raises: ValueError if the name is not valid or there is no such device.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name} is not a device name; give auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name} is not supported; give auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device={name}, but torch finds {gpus} GPUs on this machine; give auto or cpu")
    return device
