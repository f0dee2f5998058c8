"""Weighted means, the metrics file after a crash, curves, and random numbers by position."""

import math
from pathlib import Path

import torch
from PIL import Image

from cogvideo.training.metrics import Averages, MetricsFile, draw_curves
from cogvideo.training.randomness import generator_for, key_of, seed_dropout


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


def test_random_streams_depend_on_every_word_of_their_place() -> None:
    keys = [key_of(0, "a", 1, 2), key_of(0, "a", 2, 1), key_of(0, "b", 1, 2), key_of(1, "a", 1, 2), key_of(0, "a", 12)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 1 << 63 for key in keys)
    first = torch.rand(3, generator=generator_for(7, "x"))
    assert torch.equal(first, torch.rand(3, generator=generator_for(7, "x")))


def test_dropout_is_the_same_at_the_same_place() -> None:
    def mask(*place: int) -> torch.Tensor:
        seed_dropout(*place)
        return torch.nn.functional.dropout(torch.ones(64), 0.5)

    assert torch.equal(mask(0, 3, 1), mask(0, 3, 1))
    assert not torch.equal(mask(0, 3, 1), mask(0, 3, 2))
