"""Runs: files while clips grow, who generates which clips, and folders that are resumed, refused or recognised."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvideo.config import MAX_SEED
from cogvideo.distributed import ProcessGroup
from cogvideo.sampling import runner as module
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.jobs import clip_job
from cogvideo.sampling.runner import UNFINISHED, RunDirectory, claim_folder, clip_groups, sample_names, write_clips
from tests.helpers import pipelines

CONFIG = SampleConfig(rounds=1, num_clusters=8)
PIPELINE = pipelines.pipeline(CONFIG)
IDENTITY = {"weights": "abc", "clips": [["a", 0]], "settings": {"seed": 7, "key_frames": {"temperature": 1.0}}}
TOKENS = torch.arange(6).view(1, 2, 3)


def directory(out: Path, processes: ProcessGroup | None = None, **changed: Any) -> RunDirectory:
    return RunDirectory(out, {**IDENTITY, **changed}, processes or ProcessGroup())


NASTY = ["../../etc/passwd", "a; rm -rf ~ `x` $(y)", "\0\n/", "红色的数字3" * 40, "CON", "-out"]


def test_names_cannot_leave_the_folder() -> None:
    names = sample_names([nasty for nasty in NASTY for _ in range(2)])
    assert len(set(names)) == 12
    for name in names:
        assert name[:4].rstrip("-").isdigit() and len(name.encode()) < 128
        assert all(c.isalnum() or c == "-" for c in name)


def test_output_folders(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new" / "deep", overwrite=False)
    assert (tmp_path / "new" / "deep").is_dir() and not any((tmp_path / "new" / "deep").iterdir())
    (tmp_path / "new" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="is not empty; choose another folder, or --overwrite"):
        claim_folder(tmp_path / "new", overwrite=False)
    claim_folder(tmp_path / "new", overwrite=True)
    assert (tmp_path / "new" / "mine.txt").read_text() == "keep"
    with pytest.raises(FileExistsError, match="is a file"):
        claim_folder(tmp_path / "new" / "mine.txt", overwrite=True)


def test_groups() -> None:
    """The samples of a prompt stay on one process, whose clips are cut into batches."""
    job = clip_job(PIPELINE, replace(CONFIG, clips_at_once=3, samples_per_prompt=2), list("abcde"))
    groups = [clip_groups(job, ProcessGroup(rank, 2)) for rank in range(2)]
    assert groups == [[[0, 1, 4], [5, 8, 9]], [[2, 3, 6], [7]]]


def test_videos_grow_and_are_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int, float, bool]] = []

    def record(stem: Path, frames: np.ndarray, fps: float, caption: str, *, final: bool) -> Iterator[Path]:
        written.append((stem.name, len(frames), fps, final))
        yield stem

    monkeypatch.setattr(module, "write_clip", record)
    monkeypatch.setattr(RunDirectory, "end", lambda run: None)  # as if killed just before
    job = clip_job(PIPELINE, CONFIG, ["a", "b"])

    def run(resume: bool) -> None:
        folder = RunDirectory(tmp_path, job.identity(), ProcessGroup())
        assert folder.begin(resume=resume)
        written.clear()
        list(write_clips(job, folder))

    run(resume=False)
    stages = [(1, 0.25, False), (5, 1.0, False), (9, 2.0, True)]
    assert written == [(name, *stage) for stage in stages for name in ("000-a", "001-b")]
    run(resume=True)
    assert written == []
    (tmp_path / "unfinished" / "000000.safetensors").unlink()
    run(resume=True)
    assert len(written) == 6, "without its batches everything is drawn again"


def test_batches_are_kept_until_their_group_is_finished(tmp_path: Path) -> None:
    first = directory(tmp_path / "out")
    assert first.begin()
    cache = first.batch_cache(0)
    assert cache.load("round-1-000000") is None
    cache.store("round-1-000000", TOKENS)
    assert cache.num_stored == 1
    again = directory(tmp_path / "out")
    assert again.begin(resume=True)
    assert torch.equal(again.batch_cache(0).load("round-1-000000"), TOKENS)  # type: ignore[arg-type]
    assert not again.is_finished(0)
    again.finish_group([1], TOKENS + 1)
    again.finish_group([0], TOKENS)
    assert again.is_finished(0)
    assert sorted(os.listdir(again.folder)) == ["000000.safetensors", "000001.safetensors", "work.json"]
    assert torch.equal(again.gather(2), torch.cat([TOKENS, TOKENS + 1])), "in the order of the clips"
    with pytest.raises(ValueError, match="does not hold each clip exactly once"):
        again.gather(3)
    again.end()
    assert os.listdir(tmp_path / "out") == []


def test_names_on_disk_are_stable(tmp_path: Path) -> None:
    """Runs that an earlier version started can be resumed."""
    job = clip_job(PIPELINE, replace(CONFIG, clips_at_once=2), ["a", "b", "c"])
    run = RunDirectory(tmp_path, job.identity(), ProcessGroup())
    run.begin()
    *_, _ = job.stages([0, 1], run.batch_cache(0))
    names = ["first-frame-000000", "key-frames-000000", "round-1-000000", "round-1-000002"]
    assert sorted(os.listdir(run.folder)) == [*(f"000000-{name}.safetensors" for name in names), "work.json"]
    record = json.loads((run.folder / "work.json").read_text())
    assert list(record) == ["work", "processes"] and list(record["work"]) == ["clips", "settings", "given frames"]


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    first = directory(tmp_path)
    first.begin()
    for path in (tmp_path / ".a.abcd1234.tmp.mp4", first.folder / ".000000-x.abcd_234.tmp.safetensors"):
        path.write_text("half")
    assert directory(tmp_path).begin(resume=True)
    assert os.listdir(tmp_path) == [UNFINISHED] and os.listdir(first.folder) == ["work.json"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "other"}, "was started with different weights; use the same ones"),
        ({"given frames": None}, "was started by another command; resume it with that command"),
        ({"clips": [["b", 0]]}, "was started with different clips; use the same ones"),
        ({"settings": {"seed": 8, "key_frames": {"temperature": 1.0}}}, "different settings: seed=7, not 8"),
        ({"settings": {"seed": 7, "key_frames": {"temperature": 2.0}}}, "key_frames: temperature=1.0, not 2.0"),
        ({"processes": ProcessGroup(0, 1)}, None),
    ],
)
def test_resuming_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], message: str | None) -> None:
    directory(tmp_path).begin()
    before = sorted(tmp_path.rglob("*"))
    if message is None:
        assert directory(tmp_path, **changed).begin(resume=True)
        return
    with pytest.raises(ValueError, match=message):
        directory(tmp_path, **changed).begin(resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_resuming_with_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    directory(tmp_path).begin()
    record = tmp_path / UNFINISHED / "work.json"
    record.write_text(record.read_text().replace('"processes": 1', '"processes": 3'))
    with pytest.raises(ValueError, match="was started with 3 processes, not 1; start the same number"):
        directory(tmp_path).begin(resume=True)


def test_folders_of_runs(tmp_path: Path) -> None:
    assert directory(tmp_path / "new").begin(resume=True), "nothing to resume yet: it starts"
    (tmp_path / "half" / UNFINISHED).mkdir(parents=True)
    assert directory(tmp_path / "half").begin(resume=True), "killed before it had started"
    with pytest.raises(FileExistsError, match="give --resume to continue it or --overwrite to start over"):
        directory(tmp_path / "new").begin()
    directory(tmp_path / "new").batch_cache(0).store("x", TOKENS)
    assert directory(tmp_path / "new", weights="other").begin(overwrite=True)
    assert os.listdir(tmp_path / "new" / UNFINISHED) == ["work.json"]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds no run to resume"):
        directory(tmp_path / "foreign").begin(resume=True)


def test_a_finished_folder_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps({"made_from": directory(tmp_path).digest}))
    assert not directory(tmp_path).begin(resume=True)
    with pytest.raises(ValueError, match="holds finished clips of another run"):
        directory(tmp_path, weights="other").begin(resume=True)


def test_what_a_killed_end_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps({"made_from": directory(tmp_path).digest}))
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "000000.safetensors").touch()
    assert not directory(tmp_path).begin(resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.json"]


def test_the_largest_seed_is_read_back(tmp_path: Path) -> None:
    directory(tmp_path, settings={"seed": MAX_SEED}).begin()
    assert directory(tmp_path, settings={"seed": MAX_SEED}).begin(resume=True)


@pytest.mark.parametrize("text", ["", "[1]", '{"work": 3}'])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    directory(tmp_path).begin()
    (tmp_path / UNFINISHED / "work.json").write_text(text)
    with pytest.raises(ValueError, match=r"work\.json"):
        directory(tmp_path).begin(resume=True)


def test_a_damaged_batch(tmp_path: Path) -> None:
    run = directory(tmp_path)
    run.begin()
    run.batch_cache(0).store("x", TOKENS)
    path = run.folder / "000000-x.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"000000-x\.safetensors is cut short .*; start again in another folder"):
        run.batch_cache(0).load("x")
