"""A lost process ends the others with one line, whatever they wait in; a busy one ends nothing."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.helpers.ranks import finish, free_port

LIMIT = 2.0
"""Seconds without a heartbeat after which a process counts as lost."""
START_SECONDS = 60
"""How long processes may wait for each other at the start, which takes seconds on a busy machine."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.ranks_preload"])


def run(
    work: Callable[[int], None], folder: Path, *, wait_for: tuple[int, ...], before: Callable[[int], None] | None = None
) -> tuple[list[int | None], list[str]]:
    """Run `before(rank)`, then with heartbeats `work(rank)`, in two processes, until those in `wait_for` end.

    Returns their exit codes, and what both wrote to stderr.
    """
    port, files = free_port(), [folder / f"stderr_{rank}.txt" for rank in range(2)]
    processes = [
        _context.Process(target=_start, args=(work, rank, port, file, before)) for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    codes = finish([processes[rank] for rank in wait_for], 60)
    for process in processes:
        process.kill()
        process.join()
    return codes, [file.read_text(encoding="utf-8") for file in files]


def _start(
    work: Callable[[int], None], rank: int, port: int, stderr: Path, before: Callable[[int], None] | None
) -> None:
    import torch.distributed as dist

    from cogvideo.training.heartbeat import Heartbeat

    sys.stderr = stderr.open("w", encoding="utf-8")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=START_SECONDS))
    dist.barrier()
    if before is not None:
        before(rank)
    with Heartbeat(LIMIT, lambda: "step_00000007 is saved; continue from it with --resume"):
        work(rank)
    dist.destroy_process_group()


def stop_rank_1(rank: int) -> None:
    _hang_if(rank == 1)


def stop_rank_0(rank: int) -> None:
    """Rank 0 also has the store."""
    _hang_if(rank == 0)


def _hang_if(stops: bool) -> None:
    """Stop, as a machine without power does: no connection is closed. The other waits without a timeout, as in NCCL."""
    from cogvideo.distributed import store_barrier

    time.sleep(0.5)
    if stops:
        os.kill(os.getpid(), signal.SIGSTOP)
    store_barrier()


def lose_rank_1_at_once(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def fail_on_rank_1(rank: int) -> None:
    from cogvideo.distributed import store_barrier

    if rank == 1:
        raise SystemExit(3)
    store_barrier()


def limit_collectives(rank: int) -> None:
    """From now on; processes may take longer to meet."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=LIMIT))


def busy_on_rank_0(rank: int) -> None:
    """Longer than any timeout, in work for which the others wait."""
    from cogvideo.distributed import run_on_all_ranks

    assert run_on_all_ranks((lambda: time.sleep(3 * LIMIT)) if rank == 0 else None) == [None, None]


@pytest.mark.parametrize(
    ("work", "survivor", "reason"),
    [
        (stop_rank_1, 0, "no heartbeat from rank 1 for 2 s"),
        (stop_rank_0, 1, "no answer from rank 0 for 2 s"),
        (fail_on_rank_1, 0, "rank 1 failed, see its error message"),
    ],
)
def test_a_lost_process_ends_the_others_with_a_line_on_where_to_resume(
    work: Callable[[int], None], survivor: int, reason: str, tmp_path: Path
) -> None:
    codes, errors = run(work, tmp_path, wait_for=(survivor,))
    assert codes == [2], errors
    lines = [line for line in errors[survivor].splitlines() if line.startswith("cogvideo: error")]
    assert lines == [
        f"cogvideo: error: rank {survivor} lost another process ({reason}); "
        "step_00000007 is saved; continue from it with --resume"
    ]


def test_a_process_that_is_lost_before_its_first_heartbeat_is_missed(tmp_path: Path) -> None:
    codes, errors = run(stop_rank_1, tmp_path, wait_for=(0,), before=lose_rank_1_at_once)
    assert codes == [2], errors
    assert "rank 0 lost another process (no heartbeat from rank 1 for 2 s)" in errors[0]


def test_work_of_rank_0_alone_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    codes, errors = run(busy_on_rank_0, tmp_path, wait_for=(0, 1), before=limit_collectives)
    assert codes == [0, 0], errors
