"""`cogvideo inspect` end to end: shipped configs, checkpoints, and bad input."""

from pathlib import Path

import pytest

from cogvideo.checkpoint.load import save_model
from cogvideo.cli.main import main
from tests.helpers.models import tiny_config, tiny_model

CONFIGS = Path(__file__).parents[3] / "configs" / "model"
TINY_TOKENIZER = CONFIGS.parent / "train/tiny_tokenizer.yaml"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--config", str(file), "gpu=a100-80", "count=8"]) == 0
    out = capsys.readouterr().out
    assert "trainable" in out
    assert "8 x a100-80" in out
    assert ("sampling one clip" in out) == ("superres" not in out)


def test_keys_change_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "cogvideo_stage2.yaml")
    assert main(["inspect", "--config", config, "model.window_size=5", "--no-plan", "--mask", "4"]) == 0
    assert "windows of 5x5" in capsys.readouterr().out


@pytest.mark.parametrize("machine", ["1x24gb", "8x80gb"])
def test_the_files_of_a_run_are_planned_as_training_reads_them(
    machine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [CONFIGS.parent / "train/paper_stage1.yaml", CONFIGS.parent / f"deepspeed/{machine}.yaml"]
    words = [word for file in files for word in ("--config", str(file))]
    assert main(["inspect", *words, "--suggest"]) == 0
    out = capsys.readouterr().out
    expected = {
        "1x24gb": ("1 x rtx4090-24", "recompute=layer, optimiser in CPU memory", "deepspeed.offload_optimizer=true"),
        "8x80gb": ("8 x h100-80", "recompute=nothing; ", "deepspeed.stage=1"),
    }
    assert all(text in out for text in expected[machine])
    (row,) = [line for line in out.splitlines() if line.startswith("  * ZeRO")]
    assert row.endswith(", fits")


def test_words_override_the_machine_file(capsys: pytest.CaptureFixture[str]) -> None:
    files = [CONFIGS.parent / "train/paper_stage1.yaml", CONFIGS.parent / "deepspeed/8x80gb.yaml"]
    words = [word for file in files for word in ("--config", str(file))]
    assert main(["inspect", *words, "gpu=a100-40", "count=4", "init.trunk_weights=int8"]) == 0
    out = capsys.readouterr().out
    assert "4 x a100-40" in out and "int8 trunk" in out and "ZeRO 3" not in out


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", tiny_model(tiny_config("interpolation", window_size=2)))
    assert main(["inspect", "--checkpoint", str(tmp_path / "model"), "--values", "gpu=t4-16"]) == 0
    out = capsys.readouterr().out
    assert "all hashes match" in out
    assert "float32, rms" in out
    for words in (["--config", str(CONFIGS / "cogvideo_stage1.yaml")], ["model.num_layers=40"]):
        assert main(["inspect", "--checkpoint", str(tmp_path / "model"), *words]) == 2
        assert "describes a different model than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to inspect"),
        (["--config", "CONFIG", "gpu=a100"], "unknown gpu=a100; choose one of"),
        (["--config", "CONFIG", "model.window_size=7"], "does not divide the frame grid 20x20"),
        (["--config", "CONFIG", "model.layers=2"], "unknown key 'model.layers'"),
        (["--config", "CONFIG", "training.zero_stage=4"], "zero_stage=4"),
        (
            ["--config", "CONFIG", "task=sequential", "training.micro_batch=1"],
            "training.* is for files of configs/model",
        ),
        (["--config", "CONFIG", "train.recompute=all"], "train.recompute='all' is not valid"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "CONFIG", "count=0"], "count=0; expected at least 1"),
        (["--config", str(TINY_TOKENIZER)], "tiny_tokenizer.yaml is for the image tokenizer (task=tokenizer), which"),
        (
            ["--config", "CONFIG", "training.batch_size=416", "gpu=h100-80", "count=3", "--suggest"],
            "training.batch_size=416 cannot be divided among 3 devices; choose a multiple",
        ),
        (["--checkpoint", "missing"], "no checkpoint folder at missing"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(CONFIGS / "cogvideo_stage1.yaml") if word == "CONFIG" else word for word in words]
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
