"""The interactive mode of `cogvideo sample`. Not a command.

Each line of standard input is a prompt, or settings for the prompts after it (`seed=8 rounds=1`). Models stay loaded.
Each prompt's clips go to a numbered folder. An invalid line prints one error line, and the next line is read. A prompt
starts as soon as it is read. Prompts that run at the same time share forward passes (inference/batching.py).
"""

import argparse
import io
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cogvideo.cli._sampling import load_configs, read_given_clips, refuse_unused_settings, run_job, unused_when_sampling
from cogvideo.config import split_overrides
from cogvideo.logs import one_line
from cogvideo.text import MAX_CHARACTERS, normalise

if TYPE_CHECKING:
    from cogvideo.sampling.jobs import Job
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.sampling.superres import Upsampler

MAX_RUNNING = 8
"""Jobs that run at the same time; the next prompt waits until one of them ends, and no line is read meanwhile."""


def run_interactive(
    args: argparse.Namespace, pipeline: "Pipeline", upsampler: "Upsampler | None", overrides: list[str]
) -> None:
    """Run prompts until standard input ends. Raises: ValueError, OSError if the output folder cannot be used."""
    from cogvideo.files import safe_name
    from cogvideo.locks import lock_folder
    from cogvideo.sampling.config import LOADING_KEYS, UPSAMPLE_LOADING_KEYS
    from cogvideo.sampling.jobs import check_upsampling, clip_job
    from cogvideo.sampling.runner import claim_folder

    config, upsample_config = load_configs(args, overrides)
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
                    refuse_unused_settings(settings, unused_when_sampling(args, has_prompts=True))
                    changed, changed_upsample = load_configs(args, [*overrides, *settings])
                    _check_loaded(config, changed, LOADING_KEYS)
                    _check_loaded(upsample_config, changed_upsample, UPSAMPLE_LOADING_KEYS, "upsample.")
                    given = read_given_clips(args, pipeline, changed)
                    config, upsample_config, overrides = changed, changed_upsample, [*overrides, *settings]
                    if upsampler is not None and upsample_config is not None:
                        upsampler = replace(upsampler, config=upsample_config)
                elif prompt:
                    counts = dict(samples_per_caption)
                    job = clip_job(pipeline, config, [line], given, counts)
                    if upsampler is not None:
                        check_upsampling(job, upsampler)
                    samples_per_caption = counts  # a refused prompt does not count
                    workers.start(job, args.out / f"{num_prompts:03d}-{safe_name(prompt)}", upsampler)
                    num_prompts += 1
            except BrokenPipeError:  # standard output is closed
                raise
            except (ValueError, OSError) as error:
                _print_error(error)


def _check_loaded(loaded: object, changed: object, names: Sequence[str], prefix: str = "") -> None:
    """Raises: ValueError if any of the settings `names`, which determine how models are loaded, has changed."""
    for name in names:
        if getattr(changed, name, None) != getattr(loaded, name, None):
            raise ValueError(f"{prefix}{name}= cannot change: the models are already loaded")


class WorkerPool:
    """Runs each job in a thread. Leaving the context waits for all jobs, which stop early after a signal or error."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._free, self._stop = args, threading.Semaphore(MAX_RUNNING), threading.Event()
        self._threads: list[threading.Thread] = []
        self._broken_pipe: BrokenPipeError | None = None

    def start(self, job: "Job", out: Path, upsampler: "Upsampler | None") -> None:
        """Start a job once a worker is free. Raises: BrokenPipeError if standard output was closed."""
        self._free.acquire()
        if self._broken_pipe is not None:
            raise self._broken_pipe
        self._threads.append(threading.Thread(target=self._run, args=(job, out, upsampler)))
        self._threads[-1].start()

    def _run(self, job: "Job", out: Path, upsampler: "Upsampler | None") -> None:
        from cogvideo.distributed import ProcessGroup

        try:
            run_job(self._args, job, out, ProcessGroup(), self._stop, upsampler)
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
    """Lines of standard input, with a prompt on a terminal. Invalid UTF-8 is left for `clean_text` to reject."""
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
        lines.detach()  # otherwise standard input would be closed with the wrapper
