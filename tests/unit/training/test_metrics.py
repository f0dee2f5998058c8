"""Weighted means, the metrics file after a crash, and curves."""

import math
from pathlib import Path

from PIL import Image

from cogvideo.training.metrics import Averages, MetricsFile, draw_curves


def test_means_are_weighted_and_survive_saving() -> None:
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


def test_rewinding_drops_later_and_cut_lines(tmp_path: Path) -> None:
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


def test_curves_are_a_picture_even_of_nothing(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 3.0 / s, "loss/frame_1": 1.0, "validation/loss": None} for s in range(1, 4)]
    for name, some in (("some.png", records), ("none.png", [])):
        draw_curves(some, tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
