"""The recipes of docs/guides/recipes.md, as they stand there but tiny: commands run in this process.

`models/cogvideo` is a bundle of random weights with frames of 2x2 tokens, and all videos are moving digits.
"""

import csv
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from cogvideo.checkpoint.load import load_model
from cogvideo.cli.main import main
from tests.helpers.bundles import write_bundle
from tests.helpers.scripts import ROOT, load_script

PAGE = ROOT / "docs/guides/recipes.md"
RECIPE = re.compile(r"<!-- recipe: (?P<name>\w+) -->\n```bash\n(?P<text>.*?)```", re.DOTALL)
SIDE = 3
"""Of larger frames."""
MODEL = {
    **{"num_layers": 2, "hidden_size": 16, "num_heads": 2, "text_len": 32, "frame_position_start": 32},
    **{"num_positions": 64, "frame_side": 2, "window_size": "null"},
}
TRAIN = {
    **{"steps": 2, "batch_size": 4, "micro_batch_size": 4, "recompute": "nothing", "dtype": "fp32", "weights": "fp32"},
    "gradients": "dtype",
}
SMALL = {
    "train": [
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        *(f"train.{key}={value}" for key, value in TRAIN.items()),
        "log.every=1",
    ],
    "prepare": ["frame_pixels=16"],
    "bundle": ["--clusters", "8", "--dtype", "fp32"],
    "sample": ["rounds=0", "num_clusters=8", "weights=fp32"],
}
"""What is added to each command."""
LARGER = {
    "train": [f"model.frame_side={SIDE}"],
    "prepare": [f"frame_pixels={8 * SIDE}"],
    "extend": ["--frame-side", "3"],
}
LENGTHS = {"ucf101": "4.0,2.0,1.0", "kinetics600": "1.875", "longer": "4.0,2.0"}
"""Clip lengths that videos of 8 frames per second have, instead of those of a recipe's data config."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a recipe, with all that its commands read."""
    monkeypatch.chdir(tmp_path)
    for link in ("configs", "scripts"):
        Path(link).symlink_to(ROOT / link)
    write_bundle(Path("models/cogvideo"))
    assert main(["digits", "--out", "videos", "--count", "3", "--pixels", "40"]) == 0
    records = [json.loads(line) for line in Path("videos/captions.jsonl").read_text(encoding="utf-8").splitlines()]
    videos = [Path("videos", record["video"]) for record in records]
    for name, words in (("videos", "the red digit moves"), ("german", "die rote Zahl läuft")):
        Path(name).mkdir(exist_ok=True)
        for video in videos:
            shutil.copy(video, name)
        with open(f"{name}/captions.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("video", "caption"), *((video.name, words) for video in videos)])
    shutil.copy(videos[0], "first_frames.mp4")
    shutil.copy(videos[0], "picture.png")  # any video's first frame does
    for video, path in zip(videos, ("YoYo/v_YoYo_g01_c01.avi", "TaiChi/v_TaiChi_g01_c02.avi"), strict=False):
        Path("UCF-101", path).parent.mkdir(parents=True)
        shutil.copy(video, Path("UCF-101", path))
    Path("ucfTrainTestlist").mkdir()
    Path("ucfTrainTestlist/trainlist01.txt").write_text(
        "YoYo/v_YoYo_g01_c01.avi 100\nTaiChi/v_TaiChi_g01_c02.avi 90\nTaiChi/v_TaiChi_g01_c03.avi 90\n"
    )
    Path("kinetics600/train").mkdir(parents=True)
    shutil.copy(videos[0], "kinetics600/train/abc-_123456_000012_000022.mp4")
    Path("kinetics600/train.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\nriding a bike,abc-_123456,12,22,train,0\n"
        "juggling,missing,0,10,train,0\n"
    )
    return tmp_path


def commands(name: str) -> list[list[str]]:
    text = next(match["text"] for match in RECIPE.finditer(PAGE.read_text(encoding="utf-8")) if match["name"] == name)
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def in_small(name: str, words: list[str]) -> list[str]:
    words = words[words.index("cogvideo") + 1 :]  # without a launcher
    small = [*words, *SMALL.get(words[0], [])]
    if name == "larger":
        small += LARGER.get(words[0], [])
    if words[0] == "prepare" and name in LENGTHS:
        small.append(f"clips.clip_seconds=[{LENGTHS[name]}]")
    if words[0] == "sample" and name == "kinetics600":
        small.append(f"seconds={LENGTHS[name]}")
    if words[0] == "train" and name == "ucf101":
        small.append("data.clip_seconds=null")
    return small


@pytest.mark.parametrize("name", [match["name"] for match in RECIPE.finditer(PAGE.read_text(encoding="utf-8"))])
def test_a_recipe_runs(folder, name, monkeypatch):
    for words in commands(name):
        if words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            assert load_script(words[1].removeprefix("scripts/").removesuffix(".py")).main() == 0
        else:
            assert main(in_small(name, words)) == 0, shlex.join(words)
    if name == "ucf101":
        assert Path("UCF-101/classes.txt").read_text() == "tai chi\nyo yo\n"
    if name in ("longer", "kinetics600"):
        frames = {"longer": 9, "kinetics600": 16}[name]
        assert load_model(Path(f"runs/recipe/{name}/export/sequential")).config.num_frames == frames
    if name == "larger":
        assert load_model(Path("runs/recipe/larger_trunk/export/trunk")).config.frame_side == SIDE


@pytest.mark.slow
def test_the_table_is_the_planners():
    """Two rows are planned anew, since each takes seconds; a planner that changes changes them too."""
    plan, page = load_script("recipes/plan"), PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+ frames of \w+) \|", page, re.MULTILINE)
    assert rows == [size for size in plan.SIZES for _ in range(2)]
    size = rows[0]
    config, small = plan.SIZES[size]
    for machine in (plan.WHOLE, small):
        assert plan.row(size, config, *machine) in page
