"""`cogvideo inspect` end to end: shipped configs, checkpoints, and bad input."""

from pathlib import Path

import pytest

from cogvideo.checkpoint.load import save_model
from cogvideo.cli.main import main
from tests.helpers.models import tiny_config, tiny_model

CONFIGS = Path(__file__).parents[3] / "configs" / "model"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--config", str(file), "gpu=a100-80", "count=8"]) == 0
    out = capsys.readouterr().out
    assert "trainable" in out
    assert ("8 x a100-80" in out) == ("superres" not in out)


def test_keys_change_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "cogvideo_stage2.yaml")
    assert main(["inspect", "--config", config, "model.window_size=5", "--no-plan", "--mask", "4"]) == 0
    assert "windows of 5x5" in capsys.readouterr().out


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", tiny_model(tiny_config("interpolation", window_size=2)))
    assert main(["inspect", "--checkpoint", str(tmp_path / "model"), "--values", "gpu=t4-16"]) == 0
    out = capsys.readouterr().out
    assert "all hashes match" in out
    assert "float32, rms" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to inspect"),
        (["--config", "CONFIG", "gpu=a100"], "unknown gpu=a100; choose one of"),
        (["--config", "CONFIG", "model.window_size=7"], "does not divide the frame grid 20x20"),
        (["--config", "CONFIG", "model.layers=2"], "unknown key 'model.layers'"),
        (["--config", "CONFIG", "training.zero_stage=4"], "zero_stage=4"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--checkpoint", "missing"], "no checkpoint folder at missing"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(CONFIGS / "cogvideo_stage1.yaml") if word == "CONFIG" else word for word in words]
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
