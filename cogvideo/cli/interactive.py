"""The conversation of `cogvideo sample --interactive`. Not a command.

Each line of standard input is a prompt, or settings for those after it (`seed=8 rounds=1`). Models stay loaded. The
clips of a prompt get a numbered folder. What is wrong with a line is said in a line, and the next one is read. A prompt
is begun when it is read, beside those that are not yet finished: they share their forwards (sampling/together.py).
"""

import argparse
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideo.cli._common import split_overrides
from cogvideo.cli._sampling import make, unwinding
from cogvideo.logs import one_line

if TYPE_CHECKING:
    from cogvideo.sampling.jobs import Job
    from cogvideo.sampling.pipeline import Pipeline

AT_ONCE = 8
"""Prompts being made; further lines wait to be read."""


def converse(args: argparse.Namespace, pipeline: "Pipeline", overrides: list[str]) -> None:
    """Answer lines until there are no more. Raises: ValueError, OSError if it cannot begin."""
    from cogvideo.cli.sample import given_frames
    from cogvideo.files import BUNDLED_WEIGHTS, safe_name
    from cogvideo.sampling.bundle import bundle_sample_config
    from cogvideo.sampling.checked_jobs import clip_job
    from cogvideo.sampling.config import LOADING
    from cogvideo.sampling.outputs import claim_folder

    directory = args.model or BUNDLED_WEIGHTS
    config = bundle_sample_config(directory, args.config, overrides)
    given = given_frames(args, pipeline, config)
    claim_folder(args.out, args.overwrite)
    seen: dict[str, int] = {}
    """Samples of each prompt so far."""
    said = 0
    with unwinding(), _Makers(args) as makers:
        for line in _lines():
            try:
                prompt = _decode(line).strip()
                words, settings = split_overrides(prompt.split())
                if settings and not words:
                    changed = bundle_sample_config(directory, args.config, [*overrides, *settings])
                    for name in LOADING:
                        if getattr(changed, name) != getattr(config, name):
                            raise ValueError(f"{name}= is chosen at the start: the models are loaded already")
                    given = given_frames(args, pipeline, changed)
                    config, overrides = changed, [*overrides, *settings]
                elif prompt:
                    job = clip_job(pipeline, config, [prompt], given, seen)
                    makers.begin(job, args.out / f"{said:03d}-{safe_name(prompt)}")
                    said += 1
            except BrokenPipeError:  # nobody listens any more
                raise
            except (ValueError, OSError) as error:
                _complain(error)


class _Makers:
    """A thread for each job. Leaving waits for them; by a signal or an error, only until each has stopped its work."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._room, self._stopping = args, threading.Semaphore(AT_ONCE), threading.Event()
        self._threads: list[threading.Thread] = []
        self._broken: BrokenPipeError | None = None

    def begin(self, job: "Job", out: Path) -> None:
        """Raises: BrokenPipeError once nobody listens any more."""
        self._room.acquire()
        if self._broken is not None:
            raise self._broken
        self._threads.append(threading.Thread(target=self._make, args=(job, out)))
        self._threads[-1].start()

    def _make(self, job: "Job", out: Path) -> None:
        from cogvideo.distributed import ProcessGroup

        try:
            make(self._args, job, out, ProcessGroup(), stopping=self._stopping)
        except BrokenPipeError as error:
            self._broken = error
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # the other prompts go on
            _complain(error)
        except SystemExit:
            pass  # asked to stop
        finally:
            self._room.release()

    def __enter__(self) -> "_Makers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stopping.set()
        try:
            self._join()
        except BaseException:
            self._stopping.set()
            self._join()
            raise
        if kind is None and self._broken is not None:
            raise self._broken

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()


def _complain(error: Exception) -> None:
    print(f"cogvideo: error: {one_line(error)}", file=sys.stderr, flush=True)


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("this line is not UTF-8 text; type it again") from None


def _lines() -> Iterator[bytes]:
    """Lines of standard input, asked for with a sign where someone is typing them."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("prompt> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line
