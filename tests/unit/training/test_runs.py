"""Comparison of run folders, through the command: tables, the picture, and folders that are none."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cogvideo.cli.main import main
from cogvideo.config import dump_yaml, from_dict
from cogvideo.training.config import TrainConfig
from cogvideo.training.runs import Run, differences, results


def make_run(folder: Path, lr: float, losses: list[float], steps: int = 1000) -> Path:
    folder.mkdir()
    groups = {"run_dir": str(folder), "optimiser": {"lr": lr}, "train": {"steps": steps}}
    (folder / "config.yaml").write_text(dump_yaml(from_dict(TrainConfig, groups)))
    lines = [{"step": 10 * n, "loss": loss} for n, loss in enumerate(losses, 1)]
    lines += [{"step": 10 * n, "validation/loss": loss + 1} for n, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "a", 1e-3, [3.0, 1.0, 2.0]), make_run(tmp_path / "b", 2e-3, [3.0])]


def test_only_settings_that_differ_are_listed(runs: list[Path]) -> None:
    found = [Run.read(folder) for folder in runs]
    assert differences(found) == [["optimiser.lr", "0.001", "0.002"]]
    assert differences([found[0], found[0]]) == []
    older = Run(runs[1], {k: v for k, v in found[1].settings.items() if k != "train.ema_decay"}, [])
    assert ["train.ema_decay", "null", "-"] in differences([found[0], older])


def test_results_are_the_last_and_the_best(runs: list[Path]) -> None:
    assert results([Run.read(folder) for folder in runs]) == [
        ["step", "30", "10"],
        ["loss", "2.0000", "3.0000"],
        ["validation/loss", "3.0000", "4.0000"],
        ["  best, at step", "2.0000, 20", "4.0000, 10"],
    ]


def test_the_command_prints_a_table_and_draws_curves(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", *map(str, runs), "--out", str(tmp_path / "all.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [str(folder) for folder in runs]
    assert ["optimiser.lr", "0.001", "0.002"] in [line.split() for line in lines]
    assert Image.open(tmp_path / "all.png").width > 800, "a panel for the loss and one for validation"


def test_a_run_that_has_logged_nothing_is_listed_and_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "new", 1e-3, [])
    assert main(["runs", str(folder)]) == 0
    assert main(["runs", str(folder), "--out", str(tmp_path / "x.png")]) == 2
    assert "has logged anything" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}"], "is not a run folder"),
        (["{tmp}/a", "--out", "{tmp}/x.jpg"], "ends in .png"),
        (["{tmp}/a", "--out", "{tmp}/nowhere/x.png"], "there is no folder"),
        (["{tmp}/damaged"], "config.yaml"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.yaml").write_bytes(b"a: [\xff")
    assert main(["runs", *(word.format(tmp=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
