"""What training says: settings that train badly, why it stopped, and where the results are."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from cogvideo.cli.main import main
from cogvideo.config import dump_yaml
from cogvideo.data.shards import FORMATS, ROW, VERSION, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.training.config import TrainConfig
from cogvideo.training.launch import train
from cogvideo.training.tasks.tokenizer import measure_pixels
from cogvideo.training.trainer import Trainer
from tests.helpers.training import prepare_data, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


def command(config: TrainConfig, folder: Path, *words: str) -> int:
    file = folder / "run.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    return main(["train", "--config", str(file), *words])


def test_a_run_ends_with_where_its_results_are(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert command(settings(data, run, train={"steps": 2}, log={"preview_every": 2}), tmp_path) == 0
    expected = f"model: {run}/export/sequential; sample sheets: {run}/previews; curves: {run}/curves.png"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert (run / "export/sequential").is_dir() and (run / "curves.png").is_file() and list(run.glob("previews/*"))


def test_a_run_says_why_it_stopped(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(data, tmp_path / "a", train={"stop_at": 2}))
    assert "stopped at step 2 of 6 by train.stop_at=2; raise it and --resume" in capsys.readouterr().err
    train(settings(data, tmp_path / "a", train={"stop_at": 2}), resume=True)
    assert "stopped at step 2 of 6 by train.stop_at=2" in capsys.readouterr().err
    train(settings(data, tmp_path / "b", train={"time_limit_minutes": 1e-9}))
    assert "stopped at step 1 of 6 by train.time_limit_minutes=1e-09; --resume continues" in capsys.readouterr().err
    original = Trainer.train_step

    def interrupted(self: Trainer, batch: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(SystemExit):
        train(settings(data, tmp_path / "c"))
    assert "stopped at step 1 of 6 by SIGTERM; --resume continues from here" in capsys.readouterr().err
    monkeypatch.undo()
    train(settings(data, tmp_path / "d", train={"steps": 1}))
    assert "stopped" not in capsys.readouterr().err


def test_another_number_of_steps_at_resume_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(data, tmp_path / "run", train={"stop_at": 4}))
    train(settings(data, tmp_path / "run", train={"steps": 8, "stop_at": 5}), resume=True)
    message = (
        "train.steps was 6 and is 8 now: the learning-rate schedule follows the new length, so at step 4 the rate is "
    )
    assert message + "0.00775 instead of 0.0055" in capsys.readouterr().err


def test_another_number_of_steps_during_the_warmup_changes_no_rate(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a recipe's schedule is set after the steps that measured the speed."""
    warmup = {"optimiser": {"warmup_steps": 3}}
    train(settings(data, tmp_path / "run", train={"stop_at": 1}, **warmup))
    train(settings(data, tmp_path / "run", train={"steps": 8, "stop_at": 2}, **warmup), resume=True)
    assert "train.steps was" not in capsys.readouterr().err


def test_a_warmup_as_long_as_the_run_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(data, tmp_path / "run", train={"steps": 2}, optimiser={"warmup_steps": 2}))
    assert "optimiser.warmup_steps=2 is not below train.steps=2" in capsys.readouterr().err


def test_a_tokenizer_needs_steps_with_codes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, steps: int, continuous: int, **loop: object) -> None:
        groups = {"train": {"steps": steps, **loop}, "tokenizer": {"continuous_steps": continuous}}
        train(settings(data, tmp_path / name, "tokenizer", **groups))

    with pytest.raises(ValueError, match=r"train\.steps=3 ends before .* tokenizer\.continuous_steps=3"):
        run("none", 3, 3)
    run("few", 3, 2)
    assert "train.steps=3 leaves the codebook fewer steps than tokenizer.continuous_steps=2" in capsys.readouterr().err
    run("enough", 4, 2)
    assert "leaves the codebook" not in capsys.readouterr().err
    run("stopped", 4, 2, stop_at=1)
    assert "ended before the codebook is made at tokenizer.continuous_steps=2" in capsys.readouterr().err


def test_codes_in_use_are_said_at_the_end(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(data, tmp_path / "run", "tokenizer"))
    assert " of 16 image codes in use" in capsys.readouterr().err
    monkeypatch.setattr("cogvideo.data.statistics.FEW_CODES", 1.1)
    train(settings(data, tmp_path / "few", "tokenizer"))
    assert "of 16 image codes in use: frames that differ may look alike; " in capsys.readouterr().err


def test_pixels_are_measured_unless_they_are_given(data: Path, tmp_path: Path) -> None:
    train(settings(data, tmp_path / "measured", "tokenizer"))
    config = ImageTokenizer.load(tmp_path / "measured/export/image_tokenizer").config
    frames = np.load(data / "frames/shards/00000/frames.npy") / 255
    assert config.pixel_mean == pytest.approx(frames.mean((0, 1, 2)), abs=1e-5)
    assert config.pixel_std == pytest.approx(frames.std((0, 1, 2)), abs=1e-5)
    given = {"pixel_mean": [0.1, 0.2, 0.3], "pixel_std": [0.4, 0.5, 0.6]}
    train(settings(data, tmp_path / "given", "tokenizer", tokenizer=given))
    config = ImageTokenizer.load(tmp_path / "given/export/image_tokenizer").config
    assert (config.pixel_mean, config.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert measure_pixels(np.full((2, 4, 4, 3), 51, np.uint8)) == ((0.2, 0.2, 0.2), (0.01, 0.01, 0.01))


def test_frames_that_tokens_do_not_divide_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"16x16 pixels, not a multiple of the compress rate 32; .* tokenizer\.level"):
        train(
            settings(data, tmp_path / "run", "tokenizer", tokenizer={"level": 2, "channel_multipliers": [1, 1, 1, 2]})
        )


def test_held_out_frames_that_tokens_do_not_divide_are_refused_at_the_start(data: Path, tmp_path: Path) -> None:
    odd, rows = tmp_path / "odd", np.zeros(2, ROW)
    odd.mkdir()
    (odd / "captions.jsonl").write_text('{"video": "a.mp4", "text": "a dog"}\n')
    write_shard(shard_folder(odd, 0), {"rows.npy": rows, "frames.npy": np.zeros((2, 14, 14, 3), np.uint8)}, [])
    plan = {"format": FORMATS["frames"], "version": VERSION, "tokenizer": {"num_tokens": 64}}
    write_manifest(odd, plan, [read_shard(shard_folder(odd, 0))])
    config = settings(data, tmp_path / "run", "tokenizer", data={"validation": odd})
    with pytest.raises(ValueError, match=r"the frames of data\.validation have 14x14 pixels, not a multiple of the"):
        train(config)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "own",
    [
        '{"zero_optimization": 3}',
        '{"zero_optimization": {"reduce_bucket_size": -1}}',
        '{"comms_logger": true}',
        '{"elasticity": {"enabled": true}}',
        '{"activation_checkpointing": 5}',
        '{"flops_profiler": [1]}',
    ],
)
def test_deepspeed_settings_that_do_not_fit_are_one_line_with_their_file(
    own: str, stage: int, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.json"
    file.write_text(own)
    config = settings(data, tmp_path / "run", deepspeed={"stage": stage, "file": file})
    with pytest.raises(ValueError, match=rf"^{file} does not fit this run: \S") as error:
        train(config)
    assert "\n" not in str(error.value)


def test_fp16_where_it_is_not_supported_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    config = settings(data, tmp_path / "run", train={"dtype": "fp16", "weights": "dtype"})
    assert command(config, tmp_path) == 2
    said = capsys.readouterr().err
    assert "error: train.dtype=fp16 needs a GPU" in said and said.count("\n") == 1
    assert not (tmp_path / "run/checkpoints").exists()
