"""Several folders in one run: seen as data.weights says, their losses logged apart, and exact on resuming."""

from pathlib import Path

import pytest

from cogvideo.training.launch import train
from tests.helpers.training import prepare_data, read_metrics, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


def test_losses_by_folder_and_language_compose_the_loss_and_resume_exactly(data: Path, tmp_path: Path) -> None:
    groups = {
        "data": {"path": [str(data / "clips")] * 2, "weights": [3.0, 1.0], "text_tokenizer": data / "text.model"},
        "log": {"every": 3, "loss_by": ["source", "language"], "validate_every": 6, "validation_batches": 1},
    }
    groups["data"]["validation"] = str(data / "clips")
    whole, parts = (settings(data, tmp_path / name, **groups) for name in ("whole", "parts"))
    train(whole)
    train(settings(data, tmp_path / "parts", **groups, train={"stop_at": 4}))
    train(parts, resume=True)
    lines = read_metrics(whole.run_dir)
    assert read_metrics(parts.run_dir) == lines
    last = [line for line in lines if "loss" in line][-1]
    assert last["loss/english"] == pytest.approx(last["loss"])
    share = (last["loss"] - last["loss/source_1"]) / (last["loss/source_0"] - last["loss/source_1"])
    assert 0.5 < share < 1, "the first folder is seen three times as often"
    validated = next(line for line in lines if "validation/loss" in line)
    assert validated["validation/loss/source_0"] == pytest.approx(validated["validation/loss"])


@pytest.mark.parametrize("task", ["image", "tokenizer"])
def test_other_tasks_mix_too(task: str, data: Path, tmp_path: Path) -> None:
    folder = str(data / ("frames" if task == "tokenizer" else "clips"))
    mixed = {"path": [folder, folder], "weights": [1.0, 3.0], "text_tokenizer": data / "text.model"}
    losses = []
    for name, changes in (("mixed", {}), ("plain", {"weights": None})):
        run = settings(data, tmp_path / name, task, data=mixed | changes, train={"steps": 3})
        train(run)
        losses.append(read_metrics(run.run_dir)[0]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"data\.weights has 1 numbers, and data\.path 2 folders"),
        ([1.0, 0.0], r"data\.weights=.*expected numbers above 0"),
        ([1.0, float("nan")], r"data\.weights=.*expected numbers above 0"),
        ([1.0, 1e-6], r"folder 2 of data\.path would be less than one clip in 1000"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[float], message: str, data: Path, tmp_path: Path) -> None:
    paths = [str(data / "clips")] * 2
    with pytest.raises(ValueError, match=message):
        train(settings(data, tmp_path / "run", data={"path": paths, "weights": weights}))
    assert not (tmp_path / "run").exists()


def test_losses_by_language_are_refused_where_there_are_none(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"log\.loss_by .* task=tokenizer"):
        settings(data, tmp_path / "run", "tokenizer", log={"loss_by": ["language"]})
