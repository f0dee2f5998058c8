"""Training in several processes: resuming with another number of them, and what happens when one dies."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo.checkpoint.load import load_model
from cogvideo.files import read_json
from cogvideo.training.launch import train
from tests.helpers.ranks import finish, run, start, train_words
from tests.helpers.training import prepare_data, read_averages, read_metrics, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


LOW = {"dtype": "bf16", "weights": "dtype"}
VARIANTS: dict[str, dict[str, Any]] = {
    "zero0": {},
    "zero2_offloaded": {"deepspeed": {"stage": 2, "offload_optimizer": True}},
    "zero2_bf16_weights_averaged": {"deepspeed": {"stage": 2}, "train": LOW | {"ema_decay": 0.6}},
    "zero3_averaged": {"deepspeed": {"stage": 3}, "train": {"ema_decay": 0.6}},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_bitwise_in_two_processes_and_close_in_one(variant: str, data: Path, tmp_path: Path) -> None:
    groups, is_averaged = VARIANTS[variant], "averaged" in variant
    # means over two steps, so that the running averages of both processes are part of the state
    groups = groups | {"log": {"every": 2}, "model": {"dropout": 0.0, "attention_dropout": 0.0}}
    if is_averaged:  # weights and averages are swapped for every validation
        groups |= {"data": {"validation": str(data / "clips")}}
        groups["log"] |= {"validate_every": 1, "validation_batches": 1}
    whole = settings(data, tmp_path / "whole", **groups)
    stopped = settings(data, tmp_path / "parts", **groups | {"train": groups.get("train", {}) | {"stop_at": 3}})
    parts = settings(data, tmp_path / "parts", **groups)
    run(train_words(whole), 2, tmp_path / "stderr")
    run(train_words(stopped), 2, tmp_path / "stderr")
    fewer = settings(data, tmp_path / "fewer", **groups)
    shutil.copytree(parts.run_dir, fewer.run_dir)
    run(train_words(parts, "--resume"), 2, tmp_path / "stderr")
    run(train_words(fewer, "--resume"), 1, tmp_path / "stderr")

    assert read_metrics(parts.run_dir) == read_metrics(whole.run_dir)
    manifests = [read_json(c.run_dir / "checkpoints/step_00000006/manifest.json") for c in (whole, parts, fewer)]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    assert [m["world"] for m in manifests] == [2, 2, 1]
    for name in ["loss", "validation/loss"][: 1 + is_averaged]:
        expected, found = ([line[name] for line in read_metrics(c.run_dir) if name in line] for c in (whole, fewer))
        assert found == pytest.approx(expected, abs=1e-3) and found
    assert read_metrics(fewer.run_dir)[-1]["step"] == 6
    expected, found = (read_averages(c.run_dir / "checkpoints/step_00000006") for c in (whole, fewer))
    assert found.keys() == expected.keys() and bool(found) == is_averaged
    if variant == "zero3_averaged":
        for name, average in found.items():
            torch.testing.assert_close(average, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["mlp", "layer"])
def test_a_frozen_trunk_recomputed_under_zero_3_trains_and_exports_as_under_zero_1(
    recompute: str, data: Path, tmp_path: Path
) -> None:
    """The three together once crashed DeepSpeed; the export is gathered a parameter at a time."""
    trunk = settings(data, tmp_path / "trunk", "image", train={"steps": 1})
    train(trunk)
    losses, exported = [], []
    for stage in (1, 3):
        config = settings(
            data,
            tmp_path / f"stage{stage}",
            deepspeed={"stage": stage},
            init={"checkpoint": trunk.run_dir / "export/trunk", "freeze_trunk": True},
            train={"recompute": recompute, "steps": 3},
            log={"save_every": 2},
            model={"dropout": 0.0, "attention_dropout": 0.0},
        )
        run(train_words(config), 2, tmp_path / "stderr")
        losses.append([line["loss"] for line in read_metrics(config.run_dir)])
        exported.append(load_model(config.run_dir / "export/sequential").state_dict())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert all(torch.allclose(p, exported[1][name], atol=1e-5) for name, p in exported[0].items())


@pytest.mark.slow
def test_sample_sheets_take_a_bounded_part_of_the_time_that_others_wait(data: Path, tmp_path: Path) -> None:
    every = {"preview_every": 1, "preview_share": 0.0}
    config = settings(data, tmp_path / "run", "tokenizer", train={"steps": 3}, log=every)
    run(train_words(config), 2, tmp_path / "stderr")
    assert [p.name for p in (config.run_dir / "previews").iterdir()] == ["step_00000001.png"]
    stderr = (tmp_path / "stderr/stderr_0.txt").read_text(encoding="utf-8")
    assert "no sample sheet at step 2: sample sheets and distances" in stderr and "log.preview_share=0" in stderr


@pytest.mark.slow
def test_when_a_process_dies_the_others_exit_with_one_line_and_the_run_resumes(data: Path, tmp_path: Path) -> None:
    soon = {"timeout_minutes": 0.2}
    config = settings(data, tmp_path / "run", train={"steps": 100_000}, log={"save_every": 3}, deepspeed=soon)
    processes = start(train_words(config), 2, tmp_path / "stderr")
    latest, deadline = config.run_dir / "checkpoints/latest", time.monotonic() + 120
    while not latest.is_file():
        assert time.monotonic() < deadline and all(p.is_alive() for p in processes)
        time.sleep(0.05)
    processes[1].kill()
    assert finish(processes) == [2, -9]
    stderr = (tmp_path / "stderr/stderr_0.txt").read_text(encoding="utf-8")
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("cogvideo: error: rank 0 lost another process") and "--resume" in last
    saved = int(latest.read_text().strip().removeprefix("step_"))
    again = settings(data, tmp_path / "run", train={"steps": 100_000, "stop_at": saved + 3})
    run(train_words(again, "--resume"), 2, tmp_path / "stderr")
    assert latest.read_text().strip() == f"step_{saved + 3:08d}"
