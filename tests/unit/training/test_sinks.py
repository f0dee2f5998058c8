"""metrics.jsonl, wandb and TensorBoard get the same record; a full disk delays lines and cuts none."""

import resource
from pathlib import Path
from typing import Any

import pytest

from cogvideo.training import sinks
from cogvideo.training.config import LogConfig, TrainConfig
from cogvideo.training.sinks import Sinks


def test_lines_wait_for_room_and_none_is_cut(tmp_path: Path) -> None:
    out = Sinks(TrainConfig(run_dir=tmp_path / "run"))
    out.open(0)
    out.write({"step": 1, "loss": 1.0, "note": "x" * 200_000})  # longer than what a test runner writes meanwhile
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (out.file.path.stat().st_size + 5, old[1]))
        out.write({"step": 2, "loss": 0.5})
        out.write({"step": 3, "loss": 0.25})
        assert [r["step"] for r in out.file.read()] == [1]
        assert out.file.path.read_text().endswith("}\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    out.write({"step": 4, "loss": 0.125})
    assert [r["loss"] for r in out.file.read()] == [1.0, 0.5, 0.25, 0.125]


def test_tensorboard_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"cogvideo\[tensorboard\]"):
        Sinks(TrainConfig(run_dir=tmp_path, log=LogConfig(tensorboard=True)))


def test_all_get_the_same_numbers(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def log(self, numbers: dict[str, float], step: int) -> None:
            self.seen.append((step, numbers))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.seen.append((step, {name: value}))

    out = Sinks(TrainConfig(run_dir=tmp_path))
    out.open(0)
    out._wandb, out._tensorboard = Recorder(), Recorder()
    out.write({"step": 7, "loss": 2.0})
    assert out._wandb.seen == out._tensorboard.seen == [(7, {"loss": 2.0})]
    assert out.file.read() == [{"step": 7, "loss": 2.0}]


def test_tensorboard_files_hold_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = Sinks(TrainConfig(run_dir=tmp_path, log=LogConfig(tensorboard=True)))
    out.open(0)
    out.write({"step": 1, "loss": 2.0})
    out.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0)]
