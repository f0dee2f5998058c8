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

KILLS = 20
PLAIN = trainer.Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


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
def test_a_run_killed_twenty_times_ends_bitwise_the_same(data: Path, tmp_path: Path) -> None:
    groups = {"train": {"steps": 60}, "log": {"save_every": 1, "keep_last": 2}}  # so that it saves most of the time
    whole, killed = (settings(data, tmp_path / name, **groups) for name in ("whole", "killed"))
    run(train_words(whole), 1, tmp_path / "stderr")
    rng, kills, last_saved = random.Random(0), 0, 0
    while kills < KILLS:
        process = start(train_words(killed, "--resume"), 1, tmp_path / "stderr")[0]
        started = _wait_for_start(killed.run_dir, process)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        kills += process.exitcode == -9 and started
        saved = sorted((killed.run_dir / "checkpoints").glob("step_*"))
        newest = int(saved[-1].name.removeprefix("step_")) if saved else 0
        assert newest >= last_saved, "a saved step was lost"
        last_saved = newest
        if newest == 60:
            break
    assert kills >= KILLS // 2
    run(train_words(killed, "--resume"), 1, tmp_path / "stderr")
    assert read_metrics(killed.run_dir) == read_metrics(whole.run_dir)
    assert tensors(killed.run_dir, 60) == tensors(whole.run_dir, 60)
    assert not list((killed.run_dir / "checkpoints").glob(".step_*"))
    assert "damaged" not in (tmp_path / "stderr/stderr_0.txt").read_text(encoding="utf-8")


def _wait_for_start(run_dir: Path, process: Any) -> bool:
    """Wait until the process trains: it writes origin.json just before."""
    origin = run_dir / "origin.json"
    before = origin.stat().st_mtime_ns if origin.is_file() else None
    while process.is_alive():
        if origin.is_file() and origin.stat().st_mtime_ns != before:
            return True
        time.sleep(0.005)
    return False


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
    data: Path, tmp_path: Path, before_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, full = (settings(data, tmp_path / name, log={"save_every": 1}) for name in ("whole", "full"))
    train(whole)
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
    assert read_metrics(full.run_dir) == read_metrics(whole.run_dir)
    assert tensors(full.run_dir, 6) == tensors(whole.run_dir, 6)
    assert "step 3 could not be saved" in capsys.readouterr().err


def test_a_run_fails_if_its_last_step_cannot_be_saved_and_keeps_the_previous_checkpoint(
    data: Path, tmp_path: Path, before_step: Callable[..., None]
) -> None:
    whole, config = (settings(data, tmp_path / name, log={"save_every": 2}) for name in ("whole", "run"))
    train(whole)
    before_step(lambda run, step: limit_files(4096) if step == 5 else None)
    with limits_restored(), pytest.raises(OSError, match=r"step 6 could not.*step_00000004 is saved") as caught:
        train(config)
    assert caught.value.errno == errno.EFBIG and "\n" not in str(caught.value)
    before_step(lambda run, step: None)
    train(config, resume=True)
    assert read_metrics(config.run_dir) == read_metrics(whole.run_dir)


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


def test_a_time_limit_saves_and_stops(data: Path, tmp_path: Path) -> None:
    whole = settings(data, tmp_path / "whole")
    limited = settings(data, tmp_path / "limited", train={"time_limit_minutes": 1e-6})
    train(whole)
    for step in range(1, 7):
        train(limited, resume=True)
        assert (limited.run_dir / "checkpoints/latest").read_text().strip() == f"step_{step:08d}"
    assert read_metrics(limited.run_dir) == read_metrics(whole.run_dir)
