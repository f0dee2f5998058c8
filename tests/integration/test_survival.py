"""Failures that a run survives: kill -9 at any moment, a full disk, a deleted folder, non-finite gradients."""

import contextlib
import errno
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cogvideo.files import read_json
from cogvideo.training import trainer
from cogvideo.training.launch import train
from tests.helpers.ranks import run, start, train_words
from tests.helpers.training import prepare_data, read_metrics, settings

KILLS = 6
PLAIN = trainer.Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(settings(data, run_dir))
    return run_dir


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any, int], None]], None]:
    """Install a callback that runs before each step with the trainer and the 1-based step."""

    def install(act: Callable[[Any, int], None]) -> None:
        class WithCallback(PLAIN):  # type: ignore[valid-type, misc]
            def train_step(self, batch):
                act(self, self.step + 1)
                return super().train_step(batch)

        monkeypatch.setattr(trainer, "Trainer", WithCallback)

    return install


def tensors(run_dir: Path, step: int) -> dict[str, str]:
    return read_json(run_dir / f"checkpoints/step_{step:08d}/manifest.json")["tensors"]


@pytest.mark.slow
def test_a_run_killed_six_times_ends_bitwise_the_same(data: Path, tmp_path: Path) -> None:
    """Its steps are short, so that it saves most of the time."""

    def words(name: str, stop_at: int | None, *more: str) -> list[str]:
        groups = {"train": {"steps": 1000, "stop_at": stop_at}, "log": {"save_every": 1, "keep_last": 2}}
        return train_words(settings(data, tmp_path / name, **groups), *more)

    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    checkpoints, rng, last_saved = killed / "checkpoints", random.Random(0), 0
    for number in range(KILLS):
        before = _time_of_start(killed)
        process = start(words("killed", None, "--resume"), 1, tmp_path / "stderr")[0]
        _wait(process, lambda before=before: _time_of_start(killed) != before)
        if number % 2:
            _wait(process, lambda saved=last_saved: _newest(checkpoints) > saved)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert _newest(checkpoints) >= last_saved, "a saved step was lost"
        last_saved = _newest(checkpoints)
    last = last_saved + 2
    run(words("killed", last, "--resume"), 1, tmp_path / "stderr")
    run(words("whole", last), 1, tmp_path / "stderr")
    assert read_metrics(killed) == read_metrics(whole)
    assert tensors(killed, last) == tensors(whole, last)
    assert not list(checkpoints.glob(".step_*"))
    assert "damaged" not in (tmp_path / "stderr/stderr_0.txt").read_text(encoding="utf-8")


def _newest(checkpoints: Path) -> int:
    """The last step that is saved, 0 if there is none."""
    return max((int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*")), default=0)


def _time_of_start(run_dir: Path) -> int | None:
    """When a process last began to train: it writes origin.json just before."""
    origin = run_dir / "origin.json"
    return origin.stat().st_mtime_ns if origin.is_file() else None


def _wait(process: Any, is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_reached():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def limits_restored() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def limit_files(size: int) -> None:
    """Let no file grow beyond `size` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_skips_checkpoints_but_does_not_end_the_run(
    data: Path, whole: Path, tmp_path: Path, before_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    full = settings(data, tmp_path / "full", log={"save_every": 1})
    listings = []

    def fill_and_free(run: Any, step: int) -> None:
        listings.append(sorted(p.name for p in (full.run_dir / "checkpoints").glob("*")))
        if step == 3:
            limit_files(4096)
        elif step == 5:
            limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    before_step(fill_and_free)
    with limits_restored():
        train(full)
    assert listings[3] == ["latest", "step_00000001", "step_00000002"] == listings[4]
    assert read_metrics(full.run_dir) == read_metrics(whole)
    assert tensors(full.run_dir, 6) == tensors(whole, 6)
    assert "step 3 could not be saved" in capsys.readouterr().err


def test_a_run_fails_if_its_last_step_cannot_be_saved_and_keeps_the_previous_checkpoint(
    data: Path, whole: Path, tmp_path: Path, before_step: Callable[..., None]
) -> None:
    config = settings(data, tmp_path / "run", log={"save_every": 2})
    before_step(lambda run, step: limit_files(4096) if step == 5 else None)
    with limits_restored(), pytest.raises(OSError, match=r"step 6 could not.*step_00000004 is saved") as caught:
        train(config)
    assert caught.value.errno == errno.EFBIG and "\n" not in str(caught.value)
    before_step(lambda run, step: None)
    train(config, resume=True)
    assert read_metrics(config.run_dir) == read_metrics(whole)


def test_a_deleted_run_folder_is_created_again(data: Path, tmp_path: Path, before_step: Callable[..., None]) -> None:
    config = settings(data, tmp_path / "run", log={"save_every": 2})
    before_step(lambda run, step: shutil.rmtree(config.run_dir) if step == 4 else None)
    train(config)
    assert [line["step"] for line in read_metrics(config.run_dir)] == [4, 5, 6]
    for name in ("config.yaml", "origin.json", "curves.png", "checkpoints/latest", "export/sequential/manifest.json"):
        assert (config.run_dir / name).is_file(), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_infinite_gradient_leaves_weights_and_moments_unchanged(
    stage: int, data: Path, tmp_path: Path, before_step: Callable[..., None]
) -> None:
    config = settings(data, tmp_path / "run", deepspeed={"stage": stage}, log={"save_every": 1, "keep_last": 9})
    hooks = []

    def add_infinite_gradient(run: Any, step: int) -> None:
        if step == 3:
            weight = run.task.model.final_layernorm.weight
            hooks.append(weight.register_hook(lambda gradient: gradient * float("inf")))
        elif step == 4:
            hooks.pop().remove()

    before_step(add_infinite_gradient)
    last = train(config)
    assert last["skipped"] == 1
    assert tensors(config.run_dir, 2) == tensors(config.run_dir, 3) != tensors(config.run_dir, 4)
    lines = read_metrics(config.run_dir)
    assert lines[2]["loss"] is not None and "grad_norm" not in lines[2]


def test_resuming_requires_the_same_frozen_weights(data: Path, tmp_path: Path) -> None:
    """Frozen weights are not in a checkpoint, so it must not be combined with others."""
    trunks = []
    for seed in (0, 1):
        image = settings(data, tmp_path / f"trunk{seed}", "image", train={"steps": 1, "seed": seed})
        train(image)
        trunks.append(image.run_dir / "export/trunk")
    frozen = {"checkpoint": trunks[0], "freeze_trunk": True}
    train(settings(data, tmp_path / "run", init=frozen, train={"stop_at": 2}))
    manifest = read_json(tmp_path / "run/checkpoints/step_00000002/manifest.json")
    trainable = {name.partition("/")[2] for name in manifest["tensors"]}
    assert not trainable & manifest["frozen"].keys()
    assert any("temporal" in name for name in trainable) and "model.word_embeddings.weight" in manifest["frozen"]
    with pytest.raises(ValueError, match="with other frozen weights"):
        train(settings(data, tmp_path / "run", init=frozen | {"checkpoint": trunks[1]}), resume=True)
    with pytest.raises(ValueError, match="does not fit this run"):
        train(settings(data, tmp_path / "run", init={"checkpoint": trunks[0]}), resume=True)
    copy = tmp_path / "run/export/trunk"
    train(settings(data, tmp_path / "run", init=frozen | {"checkpoint": copy}), resume=True)


def test_a_time_limit_saves_and_stops(data: Path, whole: Path, tmp_path: Path) -> None:
    limited = settings(data, tmp_path / "limited", train={"time_limit_minutes": 1e-6})
    for step in range(1, 7):
        train(limited, resume=True)
        assert (limited.run_dir / "checkpoints/latest").read_text().strip() == f"step_{step:08d}"
    assert read_metrics(limited.run_dir) == read_metrics(whole)
