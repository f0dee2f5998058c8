"""The interactive mode of `cogvideo sample`. Not a command.

Each line of standard input is a prompt, or settings for the prompts after it (`seed=8 rounds=1`). Models stay loaded.
Each prompt's clips go to a numbered folder. An invalid line prints one error line, and the next line is read. A prompt
starts as soon as it is read, while earlier ones are still running: they share forward passes (inference/batching.py).
"""

import argparse
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cogvideo.cli._sampling import read_given_clips, run_job
from cogvideo.config import split_overrides
from cogvideo.logs import one_line
from cogvideo.text import MAX_CHARACTERS, normalise

if TYPE_CHECKING:
    from cogvideo.sampling.jobs import Job
    from cogvideo.sampling.pipeline import Pipeline

MAX_RUNNING = 8
"""Jobs that run at the same time; no further line is read before one of them ends."""


def run_interactive(args: argparse.Namespace, pipeline: "Pipeline", overrides: list[str]) -> None:
    """Run prompts until standard input ends. Raises: ValueError, OSError if the output folder cannot be used."""
    from cogvideo.files import BUNDLED_WEIGHTS, safe_name
    from cogvideo.locks import lock_folder
    from cogvideo.sampling.bundle import load_sample_config
    from cogvideo.sampling.config import LOADING_KEYS
    from cogvideo.sampling.jobs import clip_job
    from cogvideo.sampling.runner import claim_folder

    directory = args.model or BUNDLED_WEIGHTS
    config = load_sample_config(directory, args.config, overrides)
    given = read_given_clips(args, pipeline, config)
    samples_per_caption: dict[str, int] = {}
    num_prompts = 0
    with lock_folder(args.out), WorkerPool(args) as workers:
        claim_folder(args.out, args.overwrite)
        for line in _read_lines():
            try:
                prompt = normalise(line)
                words, settings = split_overrides(prompt.split())
                if settings and not words:
                    changed = load_sample_config(directory, args.config, [*overrides, *settings])
                    for name in LOADING_KEYS:
                        if getattr(changed, name) != getattr(config, name):
                            raise ValueError(f"{name}= cannot change: the models are already loaded")
                    given = read_given_clips(args, pipeline, changed)
                    config, overrides = changed, [*overrides, *settings]
                elif prompt:
                    job = clip_job(pipeline, config, [line], given, samples_per_caption)
                    workers.start(job, args.out / f"{num_prompts:03d}-{safe_name(prompt)}")
                    num_prompts += 1
            except BrokenPipeError:  # standard output is closed
                raise
            except (ValueError, OSError) as error:
                _print_error(error)


class WorkerPool:
    """Runs each job in a thread. Leaving the context waits for all; after a signal or an error they stop early."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._free, self._stop = args, threading.Semaphore(MAX_RUNNING), threading.Event()
        self._threads: list[threading.Thread] = []
        self._broken_pipe: BrokenPipeError | None = None

    def start(self, job: "Job", out: Path) -> None:
        """Start a job once a worker is free. Raises: BrokenPipeError if standard output was closed."""
        self._free.acquire()
        if self._broken_pipe is not None:
            raise self._broken_pipe
        self._threads.append(threading.Thread(target=self._run, args=(job, out)))
        self._threads[-1].start()

    def _run(self, job: "Job", out: Path) -> None:
        from cogvideo.distributed import ProcessGroup

        try:
            run_job(self._args, job, out, ProcessGroup(), self._stop)
        except BrokenPipeError as error:
            self._broken_pipe = error
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # other jobs continue
            _print_error(error)
        except SystemExit:
            pass  # stopped
        finally:
            self._free.release()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        try:
            self._join()
        except BaseException:
            self._stop.set()
            self._join()
            raise
        if kind is None and self._broken_pipe is not None:
            raise self._broken_pipe

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()


def _print_error(error: Exception) -> None:
    print(f"cogvideo: error: {one_line(error)}", file=sys.stderr, flush=True)


def _read_lines() -> Iterator[str]:
    """Lines of standard input, with a prompt sign on a terminal. What is not UTF-8 is left to `clean_text`."""
    on_terminal = sys.stdin.isatty()
    lines = io.TextIOWrapper(sys.stdin.buffer, "utf-8", "surrogateescape")  # ends lines at \n, \r\n and \r
    try:
        while True:
            if on_terminal:
                print("prompt> ", end="", file=sys.stderr, flush=True)
            line = rest = lines.readline(MAX_CHARACTERS + 1)
            if not line:
                return
            while len(rest) > MAX_CHARACTERS and not rest.endswith("\n"):  # too long: skip the rest of the line
                rest = lines.readline(MAX_CHARACTERS + 1)
            yield line
    finally:
        lines.detach()  # or standard input would be closed with it
