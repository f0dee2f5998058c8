"""Checkpoints that are damaged, of another version, unreadable or saved twice: what can be used is never lost."""

import errno
import os
from pathlib import Path

import pytest

from cogvideo.training import checkpointing
from cogvideo.training.launch import train
from tests.helpers.training import prepare_data, read_metrics, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


def test_damaged_checkpoints_are_skipped_and_old_ones_deleted(data: Path, tmp_path: Path) -> None:
    whole = settings(data, tmp_path / "whole", log={"save_every": 1, "keep_last": 3})
    train(whole)
    saved = sorted((whole.run_dir / "checkpoints").glob("step_*"))
    assert [place.name for place in saved] == ["step_00000004", "step_00000005", "step_00000006"]
    expected = read_metrics(whole.run_dir)
    for place in saved[1:]:
        file = next(place.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    train(whole, resume=True)
    assert read_metrics(whole.run_dir) == expected


def test_damaged_later_checkpoints_are_deleted_by_the_next_save(data: Path, tmp_path: Path) -> None:
    states = tmp_path / "run" / "checkpoints"
    train(settings(data, tmp_path / "run", log={"save_every": 1, "keep_last": 5}))
    for place in sorted(states.glob("step_*"))[1:]:
        (place / "manifest.json").write_text('{"format": 2, "files": {}}')
    log = {"save_every": 1, "keep_last": 1}
    train(settings(data, tmp_path / "run", log=log, train={"stop_at": 3}), resume=True)
    assert [place.name for place in states.glob("*step_*")] == ["step_00000003"]
    assert (states / "latest").read_text().strip() == "step_00000003"


DAMAGE = {
    "step_00000002: .*state.json has changed": lambda place: (place / "state.json").write_text("{}"),
    "step_00000001: it has no manifest.json": lambda place: (place / "manifest.json").unlink(),
    "has format 3, from a newer version": lambda place: (place / "manifest.json").write_text('{"format": 3}'),
    "has format 1, from an earlier version": lambda place: (place / "manifest.json").write_text('{"format": 1}'),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_run_without_a_usable_checkpoint_is_not_begun_again(message: str, data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "run", log={"save_every": 1}, train={"steps": 2})
    train(config)
    for place in (config.run_dir / "checkpoints").glob("step_*"):
        DAMAGE[message](place)
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*")}
    with pytest.raises(ValueError, match=message) as caught:
        train(config, resume=True)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*")} == before


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(data, tmp_path / "run", log={"save_every": 1}, train={"steps": 2})
    train(config)

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checkpointing, "sha256_file", fail)
    with pytest.raises(OSError, match=r"step_00000002 cannot be read: .*move it away") as caught:
        train(config, resume=True)
    assert caught.value.errno == errno.EIO and "\n" not in str(caught.value)
    assert len(list((config.run_dir / "checkpoints").glob("step_*"))) == 2


def test_a_step_that_is_saved_again_and_fails_keeps_its_first_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(data, tmp_path / "run", train={"steps": 2})
    train(config)
    place, rename = config.run_dir / "checkpoints/step_00000002", os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == f".{place.name}.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        rename(source, target)

    before = (place / "manifest.json").read_bytes()
    monkeypatch.setattr("cogvideo.files._exchange", lambda *names: False)  # as where the system cannot
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="step 2 could not be saved"):
        train(config, resume=True)
    assert (place / "manifest.json").read_bytes() == before and not list(place.parent.glob(".step_*"))
