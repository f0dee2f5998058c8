"""Runs a job group by group: every result is on disk as soon as it exists, and the run can be resumed at any point.

While a run is unfinished its folder holds `unfinished/`:

work.json                            what is being generated; resuming anything else is refused
000000-round-2-000128.safetensors    a batch of tokens, written once drawn: in the group that starts with clip 0, in
                                     round 2 of interpolation, the batch that starts with model clip 128
000000.safetensors                   a finished group, written after its videos; its batches are then deleted

A group is the clips that pass through all stages together. It is as large as a batch: one batch in stage 1, several in
interpolation, where each round splits a clip into more clips of the model. Every file is written by one process, and
appears complete or not at all.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from typing_extensions import TypedDict

from cogvideo.distributed import ProcessGroup
from cogvideo.files import (
    Count,
    atomic_write,
    checked,
    is_temporary,
    read_json,
    remove_all_leftovers,
    safe_name,
    write_json,
)
from cogvideo.inference.engine import Progress
from cogvideo.locks import LOCK_NAME, entries
from cogvideo.sampling.inputs import TOKENS_FILE
from cogvideo.sampling.jobs import Job
from cogvideo.sampling.outputs import SAMPLES_FILE, describe_samples, write_clip, write_summary
from cogvideo.tensor_file import read_tensors

UNFINISHED, RECORD, RESULT = "unfinished", "work.json", SAMPLES_FILE

START_ELSEWHERE = "start again in another folder, or here with --overwrite"


class Record(TypedDict):
    """The contents of work.json."""

    work: dict[str, Any]
    processes: Count


class WrittenFile(NamedTuple):
    """A file that was just written."""

    path: Path
    final: bool
    """False for the clip of an early stage, which will be replaced."""


def write_clips(
    job: Job, run: "RunDirectory", *, weights: str = "", progress: Progress | None = None
) -> Iterator[WrittenFile]:
    """Generate this process's missing clips into `run`, after `run.begin()`; yields each file once it is written.

    Videos and contact sheets appear with the first frames and are replaced after every stage. Rank 0 waits for the
    others, then writes the files that cover all clips, in which `weights` names the bundle.
    """
    names = sample_names([key.caption for key in job.keys])
    for group in clip_groups(job, run.processes):
        if run.is_finished(group[0]):
            if progress is not None:
                progress(len(group) * job.tokens_per_clip)
            continue
        cache = run.batch_cache(group[0])
        tokens, batches_before = torch.empty(0), 0
        for tokens, fps in job.stages(group, cache, progress):
            final = tokens.shape[1] == job.num_frames
            if not final and cache.num_stored == batches_before:
                continue  # loaded, not drawn: a video of this stage or a later one was written before
            batches_before = cache.num_stored
            for clip, clip_tokens in zip(group, tokens, strict=True):
                # decoded one clip at a time, so that its pixels do not depend on the group
                frames, caption = job.decode(clip_tokens), job.keys[clip].caption
                for path in write_clip(run.out / names[clip], frames, fps, caption, final=final):
                    yield WrittenFile(path, final)
        run.finish_group(group, tokens)
    run.processes.barrier()
    if run.processes.rank == 0:
        tokens = run.gather(len(job.keys))
        extra = {"weights": weights, "made_from": run.digest}
        write_summary(run.out, job.config, describe_samples(names, job.keys), tokens, seconds=job.seconds, extra=extra)
        yield WrittenFile(run.out / TOKENS_FILE, True)
        run.end()


def clip_groups(job: Job, processes: ProcessGroup) -> list[list[int]]:
    """Indices of the clips that this process generates, cut into groups. A prompt's samples stay on one process."""
    count = job.samples_per_prompt
    prompts = processes.shard(len(job.keys) // count)
    clips = [prompt * count + sample for prompt in prompts for sample in range(count)]
    return [clips[first : first + job.clips_per_group] for first in range(0, len(clips), job.clips_per_group)]


def claim_folder(out: Path, overwrite: bool) -> None:
    """Create the output folder and check that it is writable, before hours are spent.

    Raises: FileExistsError if it is not empty and `overwrite` is not set; OSError if it is not writable.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; --out must name a folder")
    if out.is_dir() and entries(out) and not overwrite:
        raise FileExistsError(f"{out} is not empty; choose another folder, or --overwrite to replace files in it")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def sample_names(captions: Sequence[str]) -> list[str]:
    """Unique, numbered file stems that keep only letters and digits of the captions."""
    return [f"{index:03d}-{safe_name(caption)}" for index, caption in enumerate(captions)]


class RunDirectory:
    """The folder of a run, filled by one or more processes; it can be interrupted at any time and resumed."""

    def __init__(self, out: Path, identity: dict[str, Any], processes: ProcessGroup) -> None:
        """`identity`: everything that determines the result, for JSON, with keys that a user understands."""
        self.out, self.folder, self.processes = out, out / UNFINISHED, processes
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read back

    @property
    def digest(self) -> str:
        """SHA-256 of the identity; results carry it, so that a finished folder is recognised."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def begin(self, *, overwrite: bool = False, resume: bool = False) -> bool:
        """Claim the folder, on all processes; returns False if the run is already finished.

        `resume` also accepts a folder that is empty or does not exist yet.
        Raises: FileExistsError, ValueError, OSError, before changing anything, if the folder holds something else.
        """
        return self.processes.broadcast_from_rank_0(lambda: self._claim(overwrite, resume))

    def _claim(self, overwrite: bool, resume: bool) -> bool:
        record = {"work": self.identity, "processes": self.processes.size}
        if resume and (self.folder / RECORD).is_file():
            self._check_same_run(read_json(self.folder / RECORD, dict[str, Any]))
            for folder in (self.out, self.folder):
                remove_all_leftovers(folder)
            self._set_aside_earlier()
            return True
        if resume and (self.out / RESULT).is_file():
            if read_json(self.out / RESULT, dict[str, Any]).get("made_from") != self.digest:
                raise ValueError(f"{self.out} holds finished clips of another run; use the same prompts and settings")
            if self.folder.is_dir():  # the run was killed in `end`
                shutil.rmtree(self.folder)
            return False
        if (
            resume
            and self.out.is_dir()
            and any(path.name != LOCK_NAME and not is_temporary(path) for path in self.out.rglob("*"))
        ):
            if any(path.name != UNFINISHED for path in entries(self.out)):
                raise FileExistsError(f"{self.out} holds no run to resume; choose another folder")
        elif self.folder.is_dir() and not overwrite:
            raise FileExistsError(
                f"{self.out} holds an unfinished run; give --resume to continue it or --overwrite to start over"
            )
        else:
            claim_folder(self.out, overwrite)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        write_json(self.folder / RECORD, record)
        self._set_aside_earlier()
        return True

    def _set_aside_earlier(self) -> None:
        """Move away the files that say that an earlier run finished, as its clips are replaced; `end` deletes them."""
        for name in (SAMPLES_FILE, TOKENS_FILE):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.out / name, self.folder / f"earlier-{name}")

    def _check_same_run(self, record: dict[str, Any]) -> None:
        """Raises: ValueError that names the difference."""
        try:
            checked(record, Record, self.folder / RECORD)
        except ValueError as error:
            raise ValueError(f"{error}; {START_ELSEWHERE}") from None
        recorded = record["work"]
        if recorded.keys() != self.identity.keys():
            raise ValueError(f"{self.out} was started by another command; resume it with that command")
        for name, value in self.identity.items():
            if recorded[name] != value:
                difference = _describe_difference(name, recorded[name], value)
                raise ValueError(f"{self.out} was started with {difference}; use the same ones")
        if record.get("processes") != self.processes.size:
            raise ValueError(
                f"{self.out} was started with {record.get('processes')} processes, not {self.processes.size}; "
                "start the same number"
            )

    def batch_cache(self, group: int) -> "GroupBatchCache":
        """The cache of the batches of the group that starts with clip `group`."""
        return GroupBatchCache(self.folder, group)

    def is_finished(self, group: int) -> bool:
        return self._group_file(group).is_file()

    def finish_group(self, clips: list[int], tokens: Tensor) -> None:
        """Keep the tokens (clips, frames, frame_len) of a group whose videos are written, for `gather`."""
        _save(self._group_file(clips[0]), tokens=tokens, clips=torch.tensor(clips))
        for path in self.folder.glob(f"{clips[0]:06d}-*.safetensors"):
            path.unlink()

    def gather(self, num_clips: int) -> Tensor:
        """The tokens of all groups of all processes, in the order of the clips: (num_clips, frames, frame_len)."""
        files = [path for path in self.folder.glob("*.safetensors") if path.stem.isdecimal()]
        groups = [_load(path) for path in files]
        for path, group in zip(files, groups, strict=True):
            tokens, clips = group["tokens"], group["clips"]
            if tokens.ndim != 3 or clips.shape != tokens.shape[:1] or tokens.shape[1:] != groups[0]["tokens"].shape[1:]:
                raise ValueError(f"{path} is damaged: its tokens have shape {list(tokens.shape)}; {START_ELSEWHERE}")
        tokens, clips = (torch.cat([group[name] for group in groups]) for name in ("tokens", "clips"))
        order = clips.argsort()
        if not torch.equal(clips[order], torch.arange(num_clips)):
            raise ValueError(f"{self.folder} does not hold each clip exactly once; {START_ELSEWHERE}")
        return tokens[order]

    def end(self) -> None:
        """Delete what was kept for resuming, after all results are written."""
        (self.folder / RECORD).unlink(missing_ok=True)  # first: without it the run cannot look unfinished
        shutil.rmtree(self.folder)

    def _group_file(self, group: int) -> Path:
        return self.folder / f"{group:06d}.safetensors"


@dataclass
class GroupBatchCache:
    """The finished batches of one group, as files of a run."""

    folder: Path
    group: int
    num_stored: int = 0
    """Batches stored through this object, that is, drawn rather than loaded."""

    def load(self, name: str) -> Tensor | None:
        path = self._file(name)
        return _load(path)["tokens"] if path.is_file() else None

    def store(self, name: str, tokens: Tensor) -> None:
        _save(self._file(name), tokens=tokens)
        self.num_stored += 1

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.group:06d}-{name}.safetensors"


def _describe_difference(name: str, recorded: Any, value: Any) -> str:
    if not isinstance(recorded, Mapping) or not isinstance(value, Mapping):
        return f"different {name}"
    for key in value:
        if recorded.get(key) != value[key]:
            if isinstance(value[key], Mapping):
                return _describe_difference(f"{name}: {key}", recorded.get(key), value[key])
            return f"different {name}: {key}={recorded.get(key)}, not {value[key]}"
    return f"different {name}"


def _save(path: Path, **tensors: Tensor) -> None:
    with atomic_write(path) as temporary:
        # not save_file, which creates files that only their owner can read
        temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _load(path: Path) -> dict[str, Tensor]:
    """`tokens`, and `clips` of a finished group, all int64. Raises: ValueError if the file is damaged."""
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; {START_ELSEWHERE}") from None
    expected = {"tokens", "clips"} if path.stem.isdecimal() else {"tokens"}
    if tensors.keys() == expected and all(tensor.dtype == torch.int64 for tensor in tensors.values()):
        return tensors
    found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())[:200]
    raise ValueError(f"{path} is damaged (it holds {found}); {START_ELSEWHERE}")
