"""`cogvideo pretrain` and `cogvideo finetune`, whole but tiny; commands run in this process, to save their starts."""

import json
import os
import subprocess
import sys
import time

import pytest

from cogvideo.cli.main import main
from cogvideo.recipes import finetune, pretrain, steps
from cogvideo.sampling.bundle import open_bundle
from cogvideo.text import read_prompts
from tests.helpers.ranks import train_words
from tests.helpers.training import prepare_data, read_metrics, settings

RECIPE = """
import sys
from cogvideo.cli.main import run_command
from cogvideo.recipes.steps import Step, run
sys.exit(run_command(lambda: run(Step("train", None, sys.argv[1:], processes=2), threads=1)))
"""
"""A recipe of one training step in two processes."""


class Ended:
    def __init__(self, code):
        self.returncode = code


@pytest.fixture
def small(monkeypatch):
    """The words of each command that a recipe runs."""
    commands = []

    def run_child(command, env=None):
        words = command[command.index("cogvideo") + 1 :]
        commands.append(words)
        return Ended(main(words))

    monkeypatch.setattr(steps, "run_child", run_child)
    monkeypatch.setattr(pretrain, "SMALL", pretrain.Size(2, 64, 2, 1e-3))
    monkeypatch.setattr(pretrain, "STEPS", dict.fromkeys(pretrain.STEPS, 12))
    monkeypatch.setattr(finetune, "STEPS", dict.fromkeys(finetune.STEPS, 8))
    monkeypatch.setattr(finetune, "MAX_NEW_PIECES", 8)
    for module in (pretrain, finetune):
        monkeypatch.setattr(module, "BATCHES", dict.fromkeys(module.BATCHES, 4))
    monkeypatch.setattr(pretrain, "MAX_FRAMES", 4)
    return commands


@pytest.mark.slow
def test_from_videos_to_a_finetuned_bundle(tmp_path, monkeypatch, small, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["digits", "--out", "videos", "--count", "6", "--pixels", "80"]) == 0
    words = ["pretrain", "--captions", "videos/captions.jsonl", "--out", "own", "--device", "cpu", "--pixels", "16"]
    assert main([*words, "--dry-run"]) == 0 and not (tmp_path / "own").exists()
    assert main(words) == 0
    assert [command[0] for command in small] == [
        *("prepare", "train", "prepare", "vocabulary", "train", "train", "train", "bundle", "sample")
    ]
    assert open_bundle(tmp_path / "own/bundle").sequential.config.frame_side == 2
    page = (tmp_path / "own/report.html").read_text(encoding="utf-8")
    assert page.count("data:image/gif") == 4 and "Stage 2" in page and "training loss" in page
    small.clear()
    assert main(words) == 0 and not small  # everything is done
    assert main([*words[:-1], "24"]) == 2 and "was begun with pixels=16, got 24" in capsys.readouterr().err
    assert main([*words, "--minutes", "9"]) == 2 and "was begun with minutes=None, got 9.0" in capsys.readouterr().err

    lines = (tmp_path / "videos/captions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    table = "".join(f'{record["video"]},"a zebra, {record["caption"]}"\n' for record in records)
    (tmp_path / "videos/mine.csv").write_text("video,caption\n" + table, encoding="utf-8")
    words = ["finetune", "own/bundle", "--captions", "videos/mine.csv", "--out", "tuned", "--train", "lora"]
    small.clear()
    assert main([*words, "--device", "cpu"]) == 0
    assert [command[0] for command in small] == [
        *("vocabulary", "prepare", *["train", "merge"] * 3, "bundle", "sample", "sample")
    ]
    assert "frames of 16x16 pixels" in capsys.readouterr().out
    tuned = open_bundle(tmp_path / "tuned/bundle")
    assert tuned.config.examples == read_prompts(tmp_path / "tuned/prompts.txt") != []
    assert tuned.text_tokenizer.vocabulary.size > open_bundle(tmp_path / "own/bundle").text_tokenizer.vocabulary.size
    page = (tmp_path / "tuned/report.html").read_text(encoding="utf-8")
    assert page.count("data:image/gif") == 8 and page.count(">before<") == 4


def test_wrong_wishes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("video,caption\nnone.mp4,a dog\n")
    words = ["pretrain", "--captions", "a.csv", "--out", "own", "--device", "cpu"]
    for more, message in (
        (["--minutes", "0"], "--minutes 0; expected a number above 0"),
        (["--minutes", "inf"], "--minutes inf; expected a number above 0"),
        (["--gpu-hours", "inf"], "--gpu-hours inf; expected a number above 0"),
        (["--gpu-hours", "2"], "--gpu-hours needs a GPU"),
        ([], "no video of a.csv can be read"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["finetune", "none", "--captions", "a.csv", "--out", "own"]) == 2
    assert "none is not a complete bundle of weights" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()


@pytest.mark.slow
def test_sigterm_to_a_recipe_saves_and_stops_its_processes(tmp_path, capsys):
    config = settings(prepare_data(tmp_path / "prepared"), tmp_path / "run", train={"steps": 100_000})
    words = train_words(config, "--resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "stderr.txt", "w+", encoding="utf-8") as stderr:
        recipe = subprocess.Popen([sys.executable, "-c", RECIPE, *words], env=environment, stderr=stderr)
        deadline = time.monotonic() + 240
        while not (config.run_dir / "metrics.jsonl").is_file() or not read_metrics(config.run_dir):
            assert time.monotonic() < deadline and recipe.poll() is None
            time.sleep(0.1)
        recipe.terminate()
        assert recipe.wait(240) == 143
        stderr.seek(0)
        assert "stopped at step" in stderr.read()
    last = read_metrics(config.run_dir)[-1]["step"]
    assert (config.run_dir / "checkpoints/latest").read_text().strip() == f"step_{last:08d}"
    time.sleep(1)
    assert read_metrics(config.run_dir)[-1]["step"] == last  # nothing trains on
    assert main([*words, f"train.stop_at={last + 1}"]) == 0, capsys.readouterr().err
    assert read_metrics(config.run_dir)[-1]["step"] == last + 1
