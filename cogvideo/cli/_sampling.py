"""What `sample`, `interpolate` and `upsample` share: options, and a job made into results. Not a command."""

import argparse
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvideo.distributed import ProcessGroup
    from cogvideo.sampling.jobs import Job


def add_making_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a folder to make, or an empty one")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--overwrite", action="store_true", help="write into a folder that holds files already")
    begin.add_argument("--resume", action="store_true", help="go on in a folder that an interrupted run left, if any")
    parser.add_argument("--model", metavar="DIR", type=Path, help="a bundle of weights (default: in the package)")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, action="append", default=[], help="a YAML file; repeat it: later wins"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")


def make(
    args: argparse.Namespace,
    job: "Job",
    out: Path,
    processes: "ProcessGroup",
    samples_per_prompt: int = 1,
    stopping: threading.Event | None = None,
) -> None:
    """Make a job's clips in `out`, as the options say. Raises: ValueError, OSError before anything is written.

    `stopping`: given in a thread beside the main one, which no signal reaches; set, it ends the work as a signal would.
    """
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.logs import get_logger, progress
    from cogvideo.sampling.bundle import fingerprint
    from cogvideo.sampling.runner import my_groups, produce
    from cogvideo.sampling.work import Work

    clips, fps = len(job.keys), (job.num_frames - 1) / job.seconds
    plan = f"{clips} clip{'s' * (clips > 1)} of {job.num_frames} frames, {fps:g} a second"
    if args.dry_run:
        if processes.rank == 0:
            print(f"{plan}: {clips * job.tokens_a_clip} tokens to draw; nothing was written")
        return
    directory = args.model or BUNDLED_WEIGHTS
    identity: dict[str, Any] = {"weights": fingerprint(directory), **job.identity()}
    work = Work(out, identity, processes)
    if not work.begin(overwrite=args.overwrite, resume=args.resume):
        if processes.rank == 0:
            print(f"{plan}: {out} is finished already")
        return
    own = sum(map(len, my_groups(job, work, samples_per_prompt)))
    name, guard = ("tokens", _ends_well(out)) if stopping is None else (out.name, nullcontext())
    with guard, progress(own * job.tokens_a_clip, name, "tok") as bar:

        def drawn(count: int) -> None:
            if stopping is not None and stopping.is_set():
                raise SystemExit(1)
            bar.update(count)

        made = produce(job, work, samples_per_prompt=samples_per_prompt, weights=str(directory), progress=drawn)
        for path, finished in made:
            if finished:
                get_logger().info(str(path))
    if processes.rank == 0:
        print(f"{plan}: {out}", flush=True)


@contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM unwind the work, as Ctrl-C does, so that no temporary file stays. For the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ends_well(out: Path) -> Iterator[None]:
    """Say how to go on after a signal."""
    from cogvideo.logs import get_logger

    try:
        with unwinding():
            yield
    except (KeyboardInterrupt, SystemExit):
        get_logger().info(f"{out}: what is done is kept; the same command with --resume goes on from there")
        raise
