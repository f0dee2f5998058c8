"""The folder of a recipe: what it was begun with, config files that are kept, schedules, order of steps."""

import os
import subprocess

import pytest
import yaml

from cogvideo.recipes import folder as module
from cogvideo.recipes.folder import RecipeFolder


@pytest.fixture
def folder(tmp_path):
    return RecipeFolder(tmp_path / "out")


def test_a_recipe_is_continued_with_what_it_was_begun_with(folder):
    folder.begin({"captions": "/a.csv", "pixels": 64})
    folder.begin({"captions": "/a.csv", "pixels": 64})
    with pytest.raises(ValueError, match="was begun with pixels=64, got 96; give the same, or another --out"):
        folder.begin({"captions": "/a.csv", "pixels": 96})
    folder.begin({"captions": "/a.csv", "pixels": 64, "minutes": 90.0})  # an older version did not record the time


def test_a_folder_of_other_things_is_refused(folder):
    folder.path.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        folder.begin({})


def test_an_edited_config_is_kept(folder):
    file = folder.write_config("trunk", "The trunk.", {"task": "image"})
    assert file.read_text().startswith("# The trunk.\n")
    file.write_text("task: sequential\n")
    folder.write_config("trunk", "The trunk.", {"task": "image"})
    assert file.read_text() == "task: sequential\n"


def test_a_schedule_is_added_once(folder):
    folder.write_config("trunk", "One.\nTwo.", {"train": {"batch_size": 4}})
    assert not folder.has_schedule("trunk")
    folder.set_schedule("trunk", {"train.steps": 9, "log.save_every": 3})
    text = folder.config("trunk").read_text()
    assert folder.has_schedule("trunk") and text.startswith("# One.\n# Two.\n")
    assert yaml.safe_load(text) == {"train": {"batch_size": 4, "steps": 9}, "log": {"save_every": 3}}


@pytest.mark.parametrize(("steps", "expected"), [(1000, 200), (100, 25), (25, 16)])
def test_the_codebook_is_made_early_in_the_schedule_and_after_the_steps_taken(folder, steps, expected):
    """15 steps are taken to measure the speed; a slow machine's schedule may have 10 more."""
    folder.write_config("tokenizer", "", {"task": "tokenizer", "tokenizer": {"channels": 16}})
    folder.set_schedule("tokenizer", {"train.steps": steps})
    values = yaml.safe_load(folder.config("tokenizer").read_text())
    assert values["tokenizer"] == {"channels": 16, "continuous_steps": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: [", "not readable as YAML"), ("- train", "expected `key: value`"), ("train: 5", "train=5; expected")],
)
def test_an_edited_config_that_cannot_be_read_is_one_line(folder, text, message):
    folder.write_config("trunk", "", {"task": "image"})
    folder.config("trunk").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        folder.has_schedule("trunk")
    assert "trunk.yaml" in str(error.value) and "\n" not in str(error.value)


def test_an_emptied_group_takes_a_schedule(folder):
    folder.write_config("trunk", "", {"task": "image"})
    folder.config("trunk").write_text("task: image\ntrain:\n")
    assert not folder.has_schedule("trunk")
    folder.set_schedule("trunk", {"train.steps": 9})
    assert yaml.safe_load(folder.config("trunk").read_text()) == {"task": "image", "train": {"steps": 9}}


def test_training_needs_a_schedule_or_a_time(folder, monkeypatch):
    """A timed recipe that was interrupted before it had a schedule, and continued without the time."""
    ran = []
    monkeypatch.setattr(module, "run", lambda step, *_: ran.append(step.name))
    folder.begin({})
    folder.write_config("trunk", "", {"task": "image"})
    with pytest.raises(ValueError, match=r"trunk\.yaml has no train\.steps.*give --minutes"):
        folder.run([folder.step("trunk", ["train"])], {"trunk": 1.0}, None, 1, {})
    assert ran == []


def test_steps_run_in_order_once_each_with_their_configs(folder, monkeypatch):
    ran = []
    monkeypatch.setattr(module, "run", lambda step, threads, environment: ran.append(step.name))
    steps = [
        folder.step("a", ["prepare"]),
        folder.step("b", ["bundle"], prepare=lambda: ran.append("config of b")),
    ]
    folder.begin({})
    folder.run(steps, {}, None, 1, {})
    assert ran == ["a", "config of b", "b"]
    folder.run(steps, {}, None, 1, {})
    assert ran == ["a", "config of b", "b"]


def test_training_gets_its_share_of_the_time(folder, monkeypatch):
    seconds = []

    def schedule(step, run_dir, left, threads, environment):
        seconds.append(round(left))
        return {"train.steps": 100}

    monkeypatch.setattr(module, "run", lambda *args: None)
    monkeypatch.setattr(module, "check_trained", lambda *args: None)
    monkeypatch.setattr(module, "schedule_for", schedule)
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    folder.begin({})
    steps = []
    for name in ("a", "b"):
        folder.write_config(name, "", {})
        steps.append(folder.step(name, ["train"]))
    folder.run(steps, {"a": 0.25, "b": 0.5}, 900.0, 1, {})
    assert seconds == [300, 900]
    assert yaml.safe_load(folder.config("a").read_text())["log"]["preview_every"] == 25


def test_commands_are_written_to_be_run_by_hand(folder):
    folder.begin({})
    folder.write_commands([folder.step("clips", ["prepare", "--captions", "my videos.csv"])])
    assert "\n# clips\ncogvideo prepare --captions 'my videos.csv'\n" in (folder / "commands.sh").read_text()


def test_commands_end_at_the_first_that_fails(folder, tmp_path):
    program = tmp_path / "bin/cogvideo"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho $1\n[ $1 != trunk ] || exit 3\n")
    program.chmod(0o755)
    folder.begin({})
    folder.write_commands([folder.step(name, [name]) for name in ("clips", "trunk", "sequential")])
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", folder / "commands.sh"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (3, ["clips", "trunk"])
