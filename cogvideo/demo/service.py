"""Generates clips for several visitors at once, with live progress. For web server and page: server.py, page.py.

    service = DemoService({"digits": ServedWeights(pipeline, config)}, out)
    for progress in service.run(Request("the red digit 3 moves left slowly", {"seed": 7})):
        ...                      # what there is to show so far; leaving the loop stops the job

Results are numbered folders under `out`, as `cogvideo sample` writes them: the same prompt, seed and settings give the
same tokens. Concurrent requests share forward passes (inference/batching.py).
"""

import re
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cogvideo.config import from_dict, to_dict
from cogvideo.demo.adapters import Turn
from cogvideo.demo.places import Limits
from cogvideo.demo.storage import limit_arenas, release_memory, remove_oldest
from cogvideo.demo.weights import ServedWeights
from cogvideo.distributed import ProcessGroup
from cogvideo.files import safe_name
from cogvideo.locks import entries
from cogvideo.logs import get_logger
from cogvideo.media.video import UNTRUSTED, check_untrusted
from cogvideo.sampling.config import LOADING_KEYS, SampleConfig
from cogvideo.sampling.inputs import InputClips, InputReader
from cogvideo.sampling.jobs import Job, clip_job, describe_job, interpolation_job, upsample_job
from cogvideo.sampling.outputs import LARGE
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.runner import RunDirectory, claim_folder, sample_names, write_clips
from cogvideo.text import split_prompts

MAX_CHARACTERS = 20_000
"""Total length of a request's prompts."""
MAX_CLIPS = 16
MAX_FRAMES = 1100
"""Total over a request's clips: one clip after 8 rounds, or 16 after 4."""
MAX_READING = 2
"""Uploads that are read at the same time; each may take a gigabyte of memory."""
REFRESH_SECONDS = 0.5
"""Time between progress reports."""

FileUse = Literal["first frame", "continue", "interpolate"]


@dataclass(frozen=True)
class Request:
    """What a visitor asks for."""

    prompts: str
    """One per line."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the weights' settings, by dotted name: {"seed": 7, "key_frames.temperature": 0.5}."""
    file: Path | None = None
    """An untrusted picture, video, or file of saved tokens."""
    file_use: FileUse = "first frame"
    upsample: bool = False
    """Make large clips too, in the folder LARGE."""
    adapters: Sequence[str] | None = None
    """Names of the weights' adapters to use; None: all."""
    weights: str | None = None
    """Name of the service's weights to use; None: the first."""


@dataclass(frozen=True)
class Progress:
    """The state of a request's job."""

    plan: str
    """For example `2 clips of 33 frames, 8 per second`."""
    folder: Path
    captions: tuple[str, ...]
    names: tuple[str, ...]
    """Stems of the clips' files in the folder."""
    total_tokens: int
    drawn_tokens: int = 0
    seconds: float = 0.0
    """Since the start."""
    files: Mapping[Path, int] = field(default_factory=dict)
    """Files written so far, and how many times each: videos are replaced by longer ones."""
    finished: bool = False
    waiting: bool = False
    """Whether it waits for jobs that run with other adapters."""
    small: "Progress | None" = None
    """For large clips: the finished clips from which they are made."""


class _Stopped(RuntimeError):
    """Not a SystemExit: the thread may also be running forward passes of other requests, and must continue."""


def check_out(out: Path) -> int:
    """The number of the next result in a folder of results, which may not exist yet.

    Raises: FileExistsError if it holds anything else, since all of its contents are served.
    """
    numbers = [-1]
    for path in entries(out) if out.is_dir() else ():
        match = re.match(r"(\d{3,})-", path.name) if path.is_dir() else None
        if match is None:
            raise FileExistsError(f"{out} holds {path.name}, which is not a result of this page; choose another folder")
        numbers.append(int(match[1]))
    return 1 + max(numbers)


class DemoService:
    """Turns requests into jobs and runs each in a thread."""

    def __init__(self, weights: Mapping[str, ServedWeights], out: Path, *, limits: Limits | None = None) -> None:
        """`weights`: those that requests may choose from, by the name that visitors see; the first is the default.

        Of `limits`, only the time per clip and the disk space are used here; places.py applies the others.

        Raises: as `check_out`; OSError if `out` is not writable.
        """
        self.weights, self.out, self.limits = dict(weights), out, limits or Limits()
        self._next_number = check_out(out)
        claim_folder(out, overwrite=True)
        self._lock, self._closed = threading.Lock(), False
        self._reading = threading.Semaphore(MAX_READING)
        self._requested: set[Path] = set()
        """Folders of requests that have not ended, even if no thread writes there, as between two jobs."""
        self._running: set[_JobThread] = set()
        limit_arenas()
        self._tidy_up()

    def run(self, request: Request) -> Generator[Progress, None, None]:
        """Check a request, then run it in a thread of its own; yields its progress at regular intervals.

        Closing the iterator stops the job at its next step; finished files stay.
        Raises: ValueError, OSError, RuntimeError, MemoryError, at any iteration.
        """
        weights = self._choose(request)
        job = self._job(request, weights)
        turn = weights.switch.enter(request.adapters)
        with self._lock:
            number, self._next_number = self._next_number, self._next_number + 1
            folder = self.out / f"{number:03d}-{safe_name(job.keys[0].caption)}"
            self._requested.add(folder)
        try:
            try:
                while not turn.has_come():
                    yield Progress(describe_job(job), folder, (), (), 0, waiting=True)
                    time.sleep(REFRESH_SECONDS)
                seconds = self.limits.seconds_per_clip * len(job.keys)
                deadline = _Deadline(seconds, time.monotonic() + seconds)
                with closing(self._run_job(job, folder, deadline, weights, turn)) as running:
                    for small in running:
                        yield small
            finally:
                turn.left = True
            if request.upsample and weights.upsampler is not None:
                upsampler = weights.upsampler
                if upsampler.config.seed == weights.config.seed:  # not set apart from the clips' own
                    upsampler = replace(upsampler, config=replace(upsampler.config, seed=job.config.seed))
                reader = InputReader(upsampler.image_tokenizer, upsampler.direct.config.low_res_side)
                large_job = upsample_job(upsampler, reader.read([folder]), None)
                with closing(self._run_job(large_job, folder / LARGE, deadline, weights)) as running:
                    for large in running:
                        yield replace(large, small=small)
        finally:
            with self._lock:
                self._requested.discard(folder)

    def running_jobs(self) -> int:
        """Number of running jobs."""
        with self._lock:
            return sum(running.thread.is_alive() for running in self._running)

    def close(self) -> None:
        """Stop all jobs and wait until they have stopped."""
        with self._lock:
            self._closed = True
        for running in self._running:
            running.stop()
            running.thread.join()

    def _tidy_up(self) -> None:
        """Remove results beyond the disk space, and return freed memory. Also called by a job's thread at its end."""
        with self._lock:
            writing = [running.folder for running in self._running if running.thread.is_alive()]
            keep = [*self._requested, *(self.out / folder.relative_to(self.out).parts[0] for folder in writing)]
        for folder in remove_oldest(self.out, self.limits.disk_bytes, keep):
            number = folder.name.partition("-")[0]  # the rest is a prompt
            get_logger(__name__).info("removed result %s, the oldest: results take too much space", number)
        release_memory()

    def _choose(self, request: Request) -> ServedWeights:
        if request.weights is None:
            return next(iter(self.weights.values()))
        if request.weights not in self.weights:
            raise ValueError(f"there are no weights {request.weights[:40]!r}; available: {', '.join(self.weights)}")
        return self.weights[request.weights]

    def _job(self, request: Request, weights: ServedWeights) -> Job:
        """The request as a job within the limits. Raises: ValueError, OSError."""
        config = _sample_config(weights.config, request.settings)
        if request.upsample and weights.upsampler is None:
            raise ValueError("super-resolution is not available here: the weights have no models for it")
        if len(request.prompts) > MAX_CHARACTERS:
            raise ValueError(f"the prompts have {len(request.prompts)} characters; give at most {MAX_CHARACTERS}")
        prompts = split_prompts(request.prompts)
        given = None
        if request.file is not None:
            with self._reading:
                given = _read_upload(weights.pipeline, request.file, request.file_use, config)
        clips = len(prompts) * config.samples_per_prompt or (len(given.samples) if given else 0)
        if not clips:
            raise ValueError("there is no prompt; describe a video in a few words")
        to_interpolate = given if request.file_use == "interpolate" else None
        if to_interpolate is not None:
            if len(prompts) > 1:
                raise ValueError(f"got {len(prompts)} prompts for one video; give a single prompt")
            clips = len(to_interpolate.tokens)
        if clips > MAX_CLIPS:
            raise ValueError(f"{clips} clips are more than the limit of {MAX_CLIPS} per request; ask for fewer")
        job: Job
        if to_interpolate is not None:
            job = interpolation_job(weights.pipeline, config, to_interpolate, prompts[0] if prompts else None)
        else:
            job = clip_job(weights.pipeline, config, prompts, given)
        frames = clips * job.num_frames
        if frames > MAX_FRAMES:
            raise ValueError(f"{frames} frames are more than the limit of {MAX_FRAMES} per request; lower rounds")
        return job

    def _run_job(
        self, job: Job, folder: Path, deadline: "_Deadline", weights: ServedWeights, turn: Turn | None = None
    ) -> Generator[Progress, None, None]:
        captions = tuple(key.caption for key in job.keys)
        progress = Progress(
            describe_job(job),
            folder,
            captions,
            tuple(sample_names(captions)),
            len(captions) * job.tokens_per_clip,
        )
        identity, place = {"weights": weights.fingerprint, **job.identity()}, weights.place
        if turn is not None and turn.names:
            adapters = [weights.adapters[name] for name in turn.names]
            identity["adapters"] = [choice.identity() | {"apart": False} for choice in adapters]
            place = " + ".join([place, *map(str, adapters)])
        run = RunDirectory(folder, identity, ProcessGroup())
        with self._lock:
            if self._closed:
                raise _Stopped("stopped")
            started, running = time.monotonic(), _JobThread(job, run, place, deadline, self._tidy_up)
            if turn is not None:
                turn.thread = running.thread
            self._running = {running, *(other for other in self._running if other.thread.is_alive())}

        def current(files: Mapping[Path, int], *, finished: bool = False) -> Progress:
            seconds = time.monotonic() - started
            return replace(progress, drawn_tokens=running.drawn_tokens, seconds=seconds, files=files, finished=finished)

        try:
            while running.thread.is_alive():
                yield current(dict(running.files))
                running.thread.join(REFRESH_SECONDS)
            if running.error is not None:
                raise running.error
            yield current({**running.files, folder / "config.yaml": 1}, finished=True)
        finally:
            running.stop()


def _sample_config(defaults: SampleConfig, settings: Mapping[str, Any]) -> SampleConfig:
    values = to_dict(defaults)
    for name, value in settings.items():
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    config = from_dict(SampleConfig, values, "settings")  # no interpolation: an untrusted value may hold `${...}`
    for name in LOADING_KEYS:
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"{name}= cannot change: the models are already loaded")
    return config


def _read_upload(pipeline: Pipeline, path: Path, use: FileUse, config: SampleConfig) -> InputClips:
    try:
        if path.suffix != ".safetensors":
            frames = len(check_untrusted(path).seconds)
            if use == "interpolate" and frames > MAX_FRAMES:
                raise ValueError(f"{path.name} has {frames} frames; send at most {MAX_FRAMES}")
        reader = InputReader(pipeline.image_tokenizer, pipeline.sequential.config.frame_side, UNTRUSTED)
        if use == "first frame":
            return reader.read_first_frame(path)
        if use == "continue":
            return reader.read_to_continue(path, pipeline.fps(config))
        return reader.read([path])
    except ValueError as error:  # do not reveal where the server stores uploads
        raise ValueError(str(error).replace(str(path), path.name)) from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read now ({error.strerror}); send it again") from None


@dataclass(frozen=True)
class _Deadline:
    """When a request must have ended."""

    seconds: float
    """Total time that it may take."""
    end: float
    """In terms of `time.monotonic`."""


class _JobThread:
    """A thread that runs one job."""

    def __init__(
        self, job: Job, run: RunDirectory, weights: str, deadline: _Deadline, at_end: Callable[[], None]
    ) -> None:
        """`at_end` is called in the thread, after the job."""
        self.folder = run.out
        self.drawn_tokens = 0
        self.files: dict[Path, int] = {}
        """How many times each file was written."""
        self.error: Exception | None = None
        """Why the job failed, once the thread has ended."""
        self._stop = False
        self._deadline, self._at_end = deadline, at_end
        self.thread = threading.Thread(target=self._run, args=(job, run, weights))
        self.thread.start()

    def stop(self) -> None:
        """Request a stop without waiting for it: the caller may be an event loop."""
        self._stop = True

    def _run(self, job: Job, run: RunDirectory, weights: str) -> None:
        try:
            run.begin()
            for path, _ in write_clips(job, run, weights=weights, progress=self._count_tokens):
                self.files[path] = self.files.get(path, 0) + 1
        except Exception as error:  # raised again where the progress is followed
            self.error = error.with_traceback(None)  # its frames would keep the job's tensors alive
        finally:
            self._at_end()

    def _count_tokens(self, drawn: int) -> None:
        if self._stop:
            raise _Stopped("stopped")
        if time.monotonic() > self._deadline.end:
            limit = f"{self._deadline.seconds:,.0f} s"
            raise _Stopped(f"stopped after {limit}, the limit here; ask for fewer rounds or samples")
        self.drawn_tokens += drawn
