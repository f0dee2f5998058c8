"""Sizes that follow from the data: the right values, and explicit ones stay."""

import json
from pathlib import Path
from typing import Any

import pytest

from cogvideo.config import dump_yaml, load_config
from cogvideo.training.config import TrainConfig
from cogvideo.training.sizes import sizes_from_data


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return write(tmp_path / "clips", frame_pixels=72, clips={"num_frames": 9})


def write(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    manifest = {"tokenizer": {"compress_rate": 8}, "config": config}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def load(*words: str) -> TrainConfig:
    return load_config(TrainConfig, [], words, derive=sizes_from_data)


def test_sizes_are_those_of_the_data(clips: Path) -> None:
    model = load(f"data.path={clips}", "model.frame_position_start=64", "model.window_size=3").model
    assert (model.frame_side, model.num_frames, model.num_positions) == (9, 9, 64 + 81)
    assert load(f"data.path=[{clips},other]").model.num_positions == 512 + 81


def test_explicit_values_stay(clips: Path) -> None:
    model = load(f"data.path={clips}", "model.frame_side=6", "model.num_positions=600", "model.num_frames=5").model
    assert (model.frame_side, model.num_frames, model.num_positions) == (6, 5, 600)
    model = load(f"data.path={clips}", "model.frame_side=6").model
    assert (model.frame_side, model.num_frames, model.num_positions) == (6, 9, 512 + 36)


def test_positions_are_those_of_the_initial_weights(clips: Path, tmp_path: Path) -> None:
    stored = {"config": {"model": {"num_positions": 1024}}}
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk/config.json").write_text(json.dumps(stored), encoding="utf-8")
    config = load(f"data.path={clips}", f"init.checkpoint={tmp_path / 'trunk'}")
    assert (config.model.frame_side, config.model.num_positions) == (9, 1024)


def test_a_resumed_run_keeps_its_sizes(clips: Path, tmp_path: Path) -> None:
    words = (f"data.path={clips}", f"run_dir={tmp_path / 'run'}")
    begun = load(*words, "model.num_positions=700")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_yaml(begun), encoding="utf-8")
    assert load(*words).model == load(words[0]).model, "without a checkpoint nothing is resumed"
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    assert load(*words).model == begun.model


def test_the_files_that_sizes_come_from_are_named(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(*words: str) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO"):
            load(f"data.path={clips}", f"run_dir={tmp_path / 'run'}", *words)
        return [record.getMessage() for record in caplog.records]

    first = "model.frame_side=9 model.num_frames=9"
    assert said() == [f"{first} model.num_positions=593: from {clips / 'manifest.json'}"]
    (tmp_path / "config.json").write_text('{"config": {"model": {"num_positions": 1024}}}', encoding="utf-8")
    assert said(f"init.checkpoint={tmp_path}") == [
        f"{first}: from {clips / 'manifest.json'}",
        f"model.num_positions=1024: from {tmp_path / 'config.json'}",
    ]
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("model: {frame_side: 6}\n", encoding="utf-8")
    assert said() == [f"model.frame_side=6: from {tmp_path / 'run/config.yaml'}"]


def test_pairs_have_two_sizes(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs", frame_pixels=120, low_res_pixels=40)
    superres = load("task=superres", f"data.path={pairs}").superres
    assert (superres.high_res_side, superres.low_res_side) == (15, 5)
    manifest = json.loads((pairs / "manifest.json").read_text(encoding="utf-8"))
    manifest["high_res_tokenizer"] = {"compress_rate": 4}
    (pairs / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    superres = load("task=superres", f"data.path={pairs}").superres
    assert (superres.high_res_side, superres.low_res_side) == (30, 5), "large frames have a tokenizer of their own"


@pytest.mark.parametrize("manifest", [None, "[]", "{", '{"config": 3}', '{"config": {"frame_pixels": "8"}}'])
def test_data_that_says_nothing_changes_nothing(manifest: str | None, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest, encoding="utf-8")
    assert load(f"data.path={tmp_path}").model == TrainConfig().model
    assert load(f"data.path={tmp_path}", "task=tokenizer").model == TrainConfig().model
    assert load("data.embedded_clips=4").model == TrainConfig().model


def test_what_is_wrong_is_still_reported(clips: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.num_heads=.* is not valid"):
        load(f"data.path={clips}", "model.num_heads=x")
    with pytest.raises(ValueError, match=r"model\.window_size=4 does not divide the frame grid 9x9"):
        load(f"data.path={clips}", "model.window_size=4")


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "[" * 100_000, "- 1", "\x00"])
def test_a_damaged_config_of_the_run_changes_nothing(clips: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    found = sizes_from_data({"run_dir": str(tmp_path), "data": {"path": str(clips)}})
    assert found["model"]["frame_side"] == 9


@pytest.mark.parametrize("text", ["data: {path: {a: b}}", "data: {path: [[a]]}", "data: {path: a}\nrun_dir: {a: b}"])
def test_what_is_no_path_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"data\.path|run_dir") as error:
        load_config(TrainConfig, [tmp_path / "run.yaml"], [], derive=sizes_from_data)
    assert "\n" not in str(error.value)
