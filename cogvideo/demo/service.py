"""Clips made for many visitors at the same time, told as it happens. No web server and no page: see page.py.

    studio = Studio(pipeline, config, out)
    for shown in studio.make(Ask("the red digit 3 moves left slowly", {"seed": 7})):
        ...                      # what there is to see by now; leaving the loop stops the work

What is made are the folders of `cogvideo sample`, numbered, under `out`: the same prompt, seed and settings give the
same tokens. Those who come at the same time share their forwards (sampling/together.py).
"""

import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cogvideo.config import from_dict, to_dict
from cogvideo.distributed import ProcessGroup
from cogvideo.files import BUNDLED_WEIGHTS, safe_name
from cogvideo.media.untrusted import check_untrusted
from cogvideo.sampling.bundle import fingerprint
from cogvideo.sampling.checked_jobs import clip_job, interpolation_job, upsample_job
from cogvideo.sampling.config import LOADING, SampleConfig
from cogvideo.sampling.inputs import Footage, FootageReader
from cogvideo.sampling.jobs import Job
from cogvideo.sampling.outputs import claim_folder, sample_names
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.runner import produce
from cogvideo.sampling.superres import Upsampler
from cogvideo.sampling.work import Work

MAX_LETTERS = 20_000
"""Of all prompts of an ask."""
MAX_CLIPS = 16
MAX_FRAMES = 1100
"""Of all clips of an ask: a clip after 8 rounds, or 16 after 4."""
REFRESH_SECONDS = 0.5
"""How often progress is told."""

Use = Literal["first frame", "continue", "interpolate"]


@dataclass(frozen=True)
class Ask:
    """What a visitor wants."""

    prompts: str
    """One a line."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Over the studio's, by their dotted names: {"seed": 7, "key_frames.temperature": 0.5}."""
    file: Path | None = None
    """A picture, a video, or saved tokens, from a stranger."""
    use: Use = "first frame"
    """What the file is for."""
    upsample: bool = False


@dataclass(frozen=True)
class Shown:
    """What there is to see of an ask."""

    plan: str
    """`2 clips of 33 frames, 8 a second`."""
    folder: Path
    captions: tuple[str, ...]
    names: tuple[str, ...]
    """Of the clips' files in the folder, without their endings."""
    total: int
    """Tokens to draw."""
    drawn: int = 0
    seconds: float = 0.0
    """Since it began."""
    files: Mapping[Path, int] = field(default_factory=dict)
    """Those that are there by now, and how many times each was written: videos are replaced by longer ones."""
    finished: bool = False


class _Stopped(RuntimeError):
    """Not SystemExit: the thread that makes a step makes it for other visitors, too, and must go on."""


class Studio:
    def __init__(
        self,
        pipeline: Pipeline,
        config: SampleConfig,
        out: Path,
        *,
        directory: Path = BUNDLED_WEIGHTS,
        upsampler: Upsampler | None = None,
    ) -> None:
        """`config`: where visitors' settings begin. `directory`: the bundle that the pipeline is of.

        Raises: FileExistsError, OSError if `out` holds anything but an earlier studio's folders, or cannot be written.
        """
        self.pipeline, self.config, self.out, self.upsampler = pipeline, config, out, upsampler
        self._directory, self._fingerprint = directory, fingerprint(directory)
        names = [path.name if path.is_dir() else "" for path in out.iterdir()] if out.is_dir() else []
        numbers = [re.match(r"(\d{3,})-", name) for name in names]
        # Whoever serves this folder must not serve what somebody else put there.
        claim_folder(out, overwrite=all(numbers))
        self._next = 1 + max((int(number[1]) for number in numbers if number), default=-1)
        self._lock, self._closed = threading.Lock(), False
        self._running: set[_Making] = set()

    @property
    def about(self) -> str:
        """The model, in a line."""
        pipeline = self.pipeline
        models = [model for model in (pipeline.trunk, pipeline.sequential, pipeline.interpolation) if model is not None]
        numbers = {id(each): each.numel() for model in models for each in model.parameters()}
        side = pipeline.sequential.config.frame_side * pipeline.image_tokenizer.compress_rate
        return (
            f"Text to video by an autoregressive transformer: {sum(numbers.values()) / 1e6:,.1f} million parameters, "
            f"frames of {side}x{side} pixels."
        )

    def make(self, ask: Ask) -> Iterator[Shown]:
        """Check the ask, then make it, in a thread of its own; every now and then, what there is to see by now.

        Closing the iterator stops the work at its next step; what was written stays.
        Raises: ValueError, OSError, RuntimeError, MemoryError, also later on.
        """
        job = self._job(ask)
        with self._lock:
            number, self._next = self._next, self._next + 1
        folder = self.out / f"{number:03d}-{safe_name(job.keys[0].caption)}"
        yield from self._run(job, folder)
        if ask.upsample and self.upsampler is not None:
            upsampler = replace(self.upsampler, config=replace(self.upsampler.config, seed=job.config.seed))
            reader = FootageReader(upsampler.image_tokenizer, upsampler.direct.config.low_res_side)
            large = folder.with_name(f"{folder.name}-large")
            yield from self._run(upsample_job(upsampler, reader.open([folder]), None), large)

    def close(self) -> None:
        """Stop all work; returns when it has stopped."""
        with self._lock:
            self._closed = True
        for making in self._running:
            making.stop()
            making.thread.join()

    def _job(self, ask: Ask) -> Job:
        prompts = [line.strip() for line in ask.prompts.splitlines() if line.strip()]
        config = self._config(ask.settings)
        if ask.upsample and self.upsampler is None:
            raise ValueError("there is no super-resolution here; `cogvideo demo --direct` gives it")
        if len(ask.prompts) > MAX_LETTERS:
            raise ValueError(f"{len(ask.prompts)} letters of prompts; give at most {MAX_LETTERS}")
        given = None if ask.file is None else self._footage(ask.file, ask.use, config)
        clips = len(prompts) * config.samples_per_prompt or (len(given.samples) if given else 0)
        if not clips:
            raise ValueError("there is no prompt; describe a video in a few words")
        if ask.use == "interpolate" and given is not None:
            if len(prompts) > 1:
                raise ValueError(f"one video, but {len(prompts)} prompts; say in one line what it shows")
            clips = len(given.tokens)
        if clips > MAX_CLIPS:
            raise ValueError(f"{clips} clips are more than the {MAX_CLIPS} that are made at once; ask for fewer")
        job: Job
        if ask.use == "interpolate" and given is not None:
            job = interpolation_job(self.pipeline, config, given, prompts[0] if prompts else None)
        else:
            job = clip_job(self.pipeline, config, prompts, given)
        frames = clips * job.num_frames
        if frames > MAX_FRAMES:
            raise ValueError(f"{frames} frames are more than the {MAX_FRAMES} that are made at once; lower rounds")
        return job

    def _config(self, settings: Mapping[str, Any]) -> SampleConfig:
        values = to_dict(self.config)
        for name, value in settings.items():
            *groups, last = name.split(".")
            inner = values
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[last] = value
        config = from_dict(SampleConfig, values, "settings")  # literally: a stranger's value may hold `${...}`
        for name in LOADING:
            if getattr(config, name) != getattr(self.config, name):
                raise ValueError(f"{name}= is chosen at the start: the models are loaded already")
        return config

    def _footage(self, path: Path, use: Use, config: SampleConfig) -> Footage:
        try:
            return self._read(path, use, config)
        except ValueError as error:  # where the server keeps it is nobody's business
            raise ValueError(str(error).replace(str(path), path.name)) from None

    def _read(self, path: Path, use: Use, config: SampleConfig) -> Footage:
        if path.suffix != ".safetensors":
            frames = len(check_untrusted(path).seconds)
            if use == "interpolate" and frames > MAX_FRAMES:
                raise ValueError(f"{path.name} has {frames} frames; send at most {MAX_FRAMES}")
        reader = FootageReader(self.pipeline.image_tokenizer, self.pipeline.sequential.config.frame_side)
        if use == "first frame":
            return reader.first_frame(path)
        return reader.to_continue(path, self.pipeline.fps(config)) if use == "continue" else reader.open([path])

    def _run(self, job: Job, folder: Path) -> Iterator[Shown]:
        clips, fps = len(job.keys), (job.num_frames - 1) / job.seconds
        captions = tuple(key.caption for key in job.keys)
        shown = Shown(
            f"{clips} clip{'s' * (clips > 1)} of {job.num_frames} frames, {fps:g} a second",
            folder,
            captions,
            tuple(sample_names(captions)),
            clips * job.tokens_a_clip,
        )
        work = Work(folder, {"weights": self._fingerprint, **job.identity()}, ProcessGroup())
        with self._lock:
            if self._closed:
                raise _Stopped("stopped")
            began, making = time.monotonic(), _Making(job, work, str(self._directory))
            self._running = {making, *(other for other in self._running if other.thread.is_alive())}
        try:
            while making.thread.is_alive():
                yield replace(shown, drawn=making.drawn, seconds=time.monotonic() - began, files=dict(making.files))
                making.thread.join(REFRESH_SECONDS)
            if making.error is not None:
                raise making.error
            files = {**making.files, folder / "config.yaml": 1}
            yield replace(shown, drawn=making.drawn, seconds=time.monotonic() - began, files=files, finished=True)
        finally:
            making.stop()


class _Making:
    """A thread that makes a job."""

    def __init__(self, job: Job, work: Work, weights: str) -> None:
        self.drawn = 0
        self.files: dict[Path, int] = {}
        """How many times each was written."""
        self.error: Exception | None = None
        """What went wrong, once the thread has ended."""
        self._stopping = False
        self.thread = threading.Thread(target=self._make, args=(job, work, weights))
        self.thread.start()

    def stop(self) -> None:
        """Ask it to. Nothing is waited for: an event loop may be calling."""
        self._stopping = True

    def _make(self, job: Job, work: Work, weights: str) -> None:
        try:
            work.begin()
            for path, _ in produce(job, work, weights=weights, progress=self._drew):
                self.files[path] = self.files.get(path, 0) + 1
        except Exception as error:  # whoever looks on raises it
            self.error = error

    def _drew(self, count: int) -> None:
        if self._stopping:
            raise _Stopped("stopped")
        self.drawn += count
