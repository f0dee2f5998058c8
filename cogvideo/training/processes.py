"""The processes of a run agreeing with each other: nobody goes on where one has failed, nobody waits for the dead."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

LOST = re.compile(r"gloo|nccl|connection (closed|reset)|socket|timed? ?out|peer", re.IGNORECASE)
"""In messages of torch.distributed where another process is gone."""


def together(work: Callable[[], T] | None) -> list[T | None]:
    """Run each process's `work` (None: nothing to do here); all results, by rank.

    Raises: OSError on every process if one of them could not read or write.
    """
    result, failed = None, None
    try:
        result = work() if work is not None else None
    except OSError as error:
        failed = (error.errno, error.strerror or str(error), None if error.filename is None else str(error.filename))
    results: list = [(result, failed)]
    if dist.get_world_size() > 1:
        results = [None] * dist.get_world_size()
        dist.all_gather_object(results, (result, failed))
    for _, problem in results:
        if problem is not None:
            raise OSError(*problem) if problem[0] is not None else OSError(problem[1])
    return [value for value, _ in results]


def any_says(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any process."""
    if dist.get_world_size() == 1:
        return flag
    told = torch.tensor([float(flag)], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told.item())


@contextlib.contextmanager
def others_may_die(what_now: Callable[[], str]) -> Iterator[None]:
    """Turn torch's account of a lost peer into a ConnectionError of one line, ended by what to do now."""
    try:
        yield
    except RuntimeError as error:
        if dist.get_world_size() == 1 or not LOST.search(str(error)):
            raise
        reason = (str(error).splitlines() or [""])[0][:160]
        raise ConnectionError(f"rank {dist.get_rank()} lost another process ({reason}); {what_now()}") from error
