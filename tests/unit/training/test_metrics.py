"""Weighted means, metrics.jsonl after a crash and on a full disk, wandb and TensorBoard, and curves."""

import math
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from cogvideo.training import metrics
from cogvideo.training.config import LogConfig, TrainConfig
from cogvideo.training.metrics import Averages, MetricsFile, MetricsWriter, draw_curves


def test_means_are_weighted_and_continue_from_saved_sums() -> None:
    averages = Averages()
    averages.add({"loss": (6.0, 2.0), "loss/4s": (5.0, 1.0)})
    saved = dict(averages.sums)
    averages.add({"loss": (1.0, 1.0), "loss/1s": (0.0, 0.0)})
    assert averages.means() == {"loss": 7.0 / 3.0, "loss/4s": 5.0}
    other = Averages()
    other.sums = saved
    other.add({"loss": (1.0, 1.0)})
    assert other.means()["loss"] == averages.means()["loss"]
    averages.clear()
    assert averages.means() == {}


def test_rewinding_drops_later_and_truncated_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    for step in range(1, 6):
        file.write({"step": step, "loss": 1.0 / step})
    with open(file.path, "a", encoding="utf-8") as stream:
        stream.write('{"step": 6, "lo')
    assert [record["step"] for record in file.read()] == [1, 2, 3, 4, 5]
    file.rewind(3)
    assert [record["step"] for record in file.read()] == [1, 2, 3]
    file.write({"step": 4, "loss": math.nan})
    assert file.read()[-1] == {"step": 4, "loss": None}


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe{", b"[1]", b'{"step": "3"}', b'{"step": -1}', b"[" * 9000, b"x" * (1 << 21), b""]
)
def test_a_damaged_line_is_left_out_and_said(tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write({"step": step})
    lines = file.path.read_bytes().splitlines()
    file.path.write_bytes(b"\n".join([lines[0], damage, lines[2], b""]))
    file.rewind(5)
    assert [record["step"] for record in file.read()] == [1, 3]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl: skipping damaged line(s) 2") == 1


def test_curves_are_drawn_even_without_records(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 3.0 / s, "loss/frame_1": 1.0, "validation/loss": None} for s in range(1, 4)]
    for name, some in (("some.png", records), ("none.png", [])):
        draw_curves(some, tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500


def test_curves_have_a_panel_per_scale_and_none_without_data(tmp_path: Path) -> None:
    def width(*names: str) -> int:
        records = [{"step": step, **dict.fromkeys(names, 1.0)} for step in range(1, 4)]
        draw_curves(records, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            return picture.width

    one = width("loss")
    assert width("loss", "loss/l1", "loss/l2") == 2 * one
    assert width("loss", "loss/l1", "loss/perplexity", "loss/codebook_used") == 4 * one


def test_on_a_full_disk_lines_are_delayed_but_never_truncated(tmp_path: Path) -> None:
    out = MetricsWriter(TrainConfig(run_dir=tmp_path / "run"))
    out.open(0)
    out.write({"step": 1, "loss": 1.0, "note": "x" * 200_000})  # larger than anything the test runner writes meanwhile
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


def test_missing_tensorboard_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e .\.\[tensorboard\]"):
        MetricsWriter(TrainConfig(run_dir=tmp_path, log=LogConfig(tensorboard=True)))


class Wandb(ModuleType):
    """Stands for the package: knows whether it is logged in, and remembers what it is asked."""

    def __init__(self, failure: str = "") -> None:
        super().__init__("wandb")
        self.failure, self.started = failure, []

    def login(self, force: bool) -> bool:
        if self.failure == "login":
            raise RuntimeError("No API key configured.\nUse `wandb login`.")
        return True

    def init(self, **options: Any) -> "Wandb":
        if self.failure == "init":
            (options["dir"] / "wandb").mkdir()
            raise RuntimeError("project not found")
        self.started.append(options)
        self.id = options["id"]
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.failure == "log":
            raise RuntimeError("the service is gone")

    def finish(self) -> None:
        pass


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("login", "No API key configured. Use `wandb login`; run `wandb login`, set WANDB_"),
        ("init", "project not found"),
    ],
)
def test_wandb_fails_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb(failure))
    with pytest.raises(ValueError, match=f"log.wandb=online: .*{message}") as error:
        MetricsWriter(TrainConfig(run_dir=tmp_path / "run", log=LogConfig(wandb="online"))).open(0)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_run_continues_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for run_dir in ("a", "a", "b"):
        MetricsWriter(TrainConfig(run_dir=tmp_path / run_dir, log=LogConfig(wandb=mode))).open(0)
    first, second, other = (options["id"] for options in wandb.started)
    assert first == second != other
    assert {options["resume"] for options in wandb.started} == {"allow" if mode == "online" else None}
    (tmp_path / "a" / "wandb.json").write_text('{"id": "../x"}')
    with pytest.raises(ValueError, match="does not contain a wandb run id; remove it"):
        MetricsWriter(TrainConfig(run_dir=tmp_path / "a", log=LogConfig(wandb=mode))).open(0)


def test_a_run_survives_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb("log"))
    out = MetricsWriter(TrainConfig(run_dir=tmp_path, log=LogConfig(wandb="offline")))
    out.open(0)
    for step in (1, 2):
        out.write({"step": step, "loss": 2.0})
    out.close()
    assert capsys.readouterr().err.count("wandb failed at step 1 (the service is gone)") == 1
    assert [record["step"] for record in out.file.read()] == [1, 2]


@pytest.mark.parametrize("failing", ["add_scalar", "add_image", "close"])
def test_a_run_survives_tensorboard(tmp_path: Path, failing: str, capsys: pytest.CaptureFixture[str]) -> None:
    class TensorBoard:
        def __getattr__(self, name: str) -> Any:
            def call(*values: Any, **options: Any) -> None:
                if name == failing:
                    raise OSError(28, "No space left on device")

            return call

    Image.new("RGB", (4, 4)).save(tmp_path / "sheet.png")
    out = MetricsWriter(TrainConfig(run_dir=tmp_path))
    out.open(0)
    out._tensorboard = TensorBoard()
    for step in (1, 2):
        out.write({"step": step, "loss": 2.0})
        out.write_image("samples", tmp_path / "sheet.png", step)
    out.close()
    assert capsys.readouterr().err.count("No space left on device); the run goes on without it") == 1
    assert [record["step"] for record in out.file.read()] == [1, 2]


def test_every_destination_gets_the_same_record(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def log(self, numbers: dict[str, float], step: int) -> None:
            self.seen.append((step, numbers))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.seen.append((step, {name: value}))

    out = MetricsWriter(TrainConfig(run_dir=tmp_path))
    out.open(0)
    out._wandb, out._tensorboard = Recorder(), Recorder()
    out.write({"step": 7, "loss": 2.0})
    assert out._wandb.seen == out._tensorboard.seen == [(7, {"loss": 2.0})]
    assert out.file.read() == [{"step": 7, "loss": 2.0}]


def test_tensorboard_files_hold_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = MetricsWriter(TrainConfig(run_dir=tmp_path, log=LogConfig(tensorboard=True)))
    out.open(0)
    out.write({"step": 1, "loss": 2.0})
    out.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0)]
