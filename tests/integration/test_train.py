"""Training end to end in this process: every task trains and resumes bitwise; bad steps and bad input are handled."""

import hashlib
import json
import re
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogvideo.checkpoint.format import load_checkpoint, save_checkpoint
from cogvideo.checkpoint.load import load_model
from cogvideo.config import to_dict
from cogvideo.dtypes import QuantizedName
from cogvideo.kernels import cpu
from cogvideo.model.quantize import quantize
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.training import trainer
from cogvideo.training.config import TrainConfig, changed_settings
from cogvideo.training.launch import train
from cogvideo.training.metrics import draw_curves
from cogvideo.training.tasks.base import LossAndMetrics
from tests.helpers.training import prepare_data, read_metrics, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def trunk(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trunk") / "run"
    train(settings(data, run_dir, "image"))
    return run_dir / "export" / "trunk"


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


VARIANTS = {
    "fp32": {},
    "bf16": {"train": {"dtype": "bf16"}},
    "bf16_weights": {"train": {"dtype": "bf16", "weights": "dtype"}},
    "zero1_bf16_weights": {"train": {"dtype": "bf16", "weights": "dtype"}, "deepspeed": {"stage": 1}},
    "zero1": {"deepspeed": {"stage": 1}},
    "zero2": {"deepspeed": {"stage": 2}},
    "zero2_bf16_weights": {"train": {"dtype": "bf16", "weights": "dtype"}, "deepspeed": {"stage": 2}},
    "zero3": {"deepspeed": {"stage": 3}},
    "zero3_bf16_weights": {"train": {"dtype": "bf16", "weights": "dtype"}, "deepspeed": {"stage": 3}},
    "checkpointed": {"train": {"recompute": "layer"}},
}

FROZEN_VARIANTS = [("fp32", True), ("zero2_bf16_weights", True), ("zero3", True)]


def from_trunk(variant: str, trunk: Path, frozen: bool = False) -> dict[str, dict[str, Any]]:
    """Settings of a run that begins with the trunk."""
    return VARIANTS[variant] | {"init": {"checkpoint": trunk, "freeze_trunk": frozen}}


@pytest.fixture(scope="module")
def whole_run(data: Path, trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], TrainConfig]:
    """An uninterrupted run from the trunk, by variant and whether the trunk is frozen; each is trained once."""

    @cache
    def trained(variant: str, frozen: bool) -> TrainConfig:
        config = settings(data, tmp_path_factory.mktemp("whole") / "run", **from_trunk(variant, trunk, frozen))
        train(config)
        return config

    return trained


@pytest.mark.slow
@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler here")
def test_compiled_layers_train_alike(data: Path, tmp_path: Path) -> None:
    """With the accumulated gradients, the mixed precision and the validation of a real run; texts are padded to 16."""
    no_dropout, losses = {"dropout": 0.0, "attention_dropout": 0.0}, []
    for compiled in (False, True):
        train_settings = {"compile": compiled, "recompute": "layer"}
        run = settings(data, tmp_path / str(compiled), "interpolation", model=no_dropout, train=train_settings)
        torch.manual_seed(0)
        train(run)
        losses.append([line["loss"] for line in read_metrics(run.run_dir) if "loss" in line])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("variant", "frozen"), [*((name, False) for name in VARIANTS), *FROZEN_VARIANTS])
def test_resuming_is_bitwise_exact(
    variant: str, frozen: bool, data: Path, trunk: Path, whole_run: Callable[[str, bool], TrainConfig], tmp_path: Path
) -> None:
    groups = from_trunk(variant, trunk, frozen)
    whole, parts = whole_run(variant, frozen), settings(data, tmp_path / "parts", **groups)
    stopped = settings(data, tmp_path / "parts", **groups | {"train": groups.get("train", {}) | {"stop_at": 3}})
    train(stopped)
    train(parts, resume=True)
    assert [line["step"] for line in read_metrics(parts.run_dir)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(whole.run_dir) == read_metrics(parts.run_dir)
    exports = [config.run_dir / "export" / "sequential" for config in (whole, parts)]
    assert digest(exports[0]) == digest(exports[1])
    tensors = load_checkpoint(exports[0]).tensors()
    before = load_checkpoint(trunk).tensors()
    changed = {name for name in before if not torch.equal(before[name], tensors[name].to(before[name].dtype))}
    if frozen and "weights" not in variant:
        assert not changed
    elif not frozen:
        assert len(changed) == len(before)


@pytest.mark.parametrize(
    ("held", "variant"),
    [
        *(("int8", variant) for variant in ("fp32", "bf16", "zero2_bf16_weights", "checkpointed")),
        *(("float8", variant) for variant in ("fp32", "zero2_bf16_weights")),
    ],
)
def test_a_quantized_trunk_trains_like_its_dequantized_weights(
    held: QuantizedName, variant: str, data: Path, trunk: Path, tmp_path: Path
) -> None:
    """The losses are the same, resuming is bitwise exact, and the exported trunk is the original one."""
    groups = VARIANTS[variant] | {"init": {"checkpoint": trunk, "freeze_trunk": True, "trunk_weights": held}}
    whole, parts = (settings(data, tmp_path / name, **groups) for name in ("whole", "parts"))
    train(whole)
    rounded = settings(
        data,
        tmp_path / "rounded",
        **groups | {"init": {"checkpoint": _rounded(trunk, tmp_path, held), "freeze_trunk": True}},
    )
    train(rounded)
    losses, expected = ([line["loss"] for line in read_metrics(config.run_dir)] for config in (whole, rounded))
    # the temporal parts start as the trunk's weights before they are rounded, there as the rounded ones
    start = {"int8": 1e-4, "float8": 1e-3}[held]
    assert losses == pytest.approx(expected, abs=start if variant in ("fp32", "checkpointed") else 1e-2)
    train(settings(data, tmp_path / "parts", **groups | {"train": groups.get("train", {}) | {"stop_at": 3}}))
    full = groups | {"init": groups["init"] | {"trunk_weights": "full"}}
    with pytest.raises(ValueError, match=r"other frozen weights .* init\.trunk_weights"):
        train(settings(data, tmp_path / "parts", **full), resume=True)
    train(parts, resume=True)
    assert read_metrics(whole.run_dir) == read_metrics(parts.run_dir)
    exports = [config.run_dir / "export" / "sequential" for config in (whole, parts)]
    assert digest(exports[0]) == digest(exports[1])
    _same_trunk(exports[0], trunk)
    if variant == "fp32":  # stage 2 with the trunk of stage 1
        init = groups["init"] | {"checkpoint": exports[0], "temporal": "copy"}
        second = settings(data, tmp_path / "second", "interpolation", init=init, train={"steps": 1})
        train(second)
        _same_trunk(second.run_dir / "export" / "interpolation", trunk)


def _rounded(trunk: Path, folder: Path, held: QuantizedName) -> Path:
    """A trunk of quantized and dequantized weights."""
    stored = load_checkpoint(trunk)
    tensors = {}
    for name, tensor in stored.tensors().items():
        matrix = tensor.ndim == 2 and name != "position_embeddings.weight"
        scale, narrow = quantize(tensor, held) if matrix else (None, tensor)
        tensors[name] = tensor if scale is None else narrow.float() * scale[:, None]
    save_checkpoint(folder / "rounded_trunk", tensors, stored.config)
    return folder / "rounded_trunk"


def _same_trunk(export: Path, trunk: Path) -> None:
    found, expected = load_checkpoint(export).tensors(), load_checkpoint(trunk).tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    load_model(export)


def test_zero_stages_and_recomputation_have_the_same_losses_and_gradient_norms(
    whole_run: Callable[[str, bool], TrainConfig],
) -> None:
    losses, norms = {}, {}
    for variant in ("fp32", "zero1", "zero2", "zero3", "checkpointed"):
        lines = read_metrics(whole_run(variant, False).run_dir)
        losses[variant] = [line["loss"] for line in lines]
        last = lines[-1]
        norms[variant] = {name: value for name, value in last.items() if name.startswith("grad_norm")}
    for variant, found in losses.items():
        assert found == pytest.approx(losses["fp32"], abs=1e-4), variant
        assert norms[variant] == pytest.approx(norms["fp32"], rel=1e-3), variant
    parts = norms["fp32"].copy()
    total = parts.pop("grad_norm")
    names = {"embeddings", "spatial", "temporal", "mlp", "layernorm", "mix"}
    assert parts.keys() == {f"grad_norm/{name}" for name in names}
    assert sum(norm**2 for norm in parts.values()) == pytest.approx(total**2, rel=1e-5)


def test_the_image_tokenizer_resumes_bitwise_and_updates_its_codebook(data: Path, tmp_path: Path) -> None:
    whole, parts = (settings(data, tmp_path / name, "tokenizer") for name in ("whole", "parts"))
    train(whole)
    train(settings(data, tmp_path / "parts", "tokenizer", train={"stop_at": 4}))
    train(parts, resume=True)
    assert read_metrics(whole.run_dir) == read_metrics(parts.run_dir)
    exports = [config.run_dir / "export" / "image_tokenizer" for config in (whole, parts)]
    assert digest(exports[0]) == digest(exports[1])
    tokenizer = ImageTokenizer.load(exports[0])
    ids = tokenizer.encode(torch.rand(2, 3, 16, 16))
    assert tokenizer.decode(ids).shape == (2, 3, 16, 16)
    assert "loss/perplexity" in read_metrics(whole.run_dir)[-1]
    draw_curves(read_metrics(whole.run_dir), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.width > 2200  # four panels


@pytest.mark.usefixtures("drawn_curves")
def test_the_loss_falls_and_every_frame_and_length_is_logged(data: Path, tmp_path: Path) -> None:
    config = settings(
        data,
        tmp_path / "run",
        data={"validation": data / "clips"},
        train={"steps": 40},
        log={"every": 10, "peak_tflops": None},
    )
    assert train(config)["mfu"] > 0
    lines = [line for line in read_metrics(config.run_dir) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    names = {"loss/frame_1", "loss/frame_4", "loss/4s", "loss/1s", "grad_norm", "lr", "alpha/layer_1"}
    assert names <= lines[-1].keys()
    assert any("validation/loss" in line for line in read_metrics(config.run_dir))
    for name in ("config.yaml", "origin.json"):
        assert (config.run_dir / name).stat().st_size > 0
    with Image.open(config.run_dir / "curves.png") as curves:
        assert curves.width > 1100  # two panels
    origin = json.loads((config.run_dir / "origin.json").read_text())
    assert origin["packages"]["torch"] and origin["command"]


def test_stage_two_copies_stage_one_and_shares_its_frozen_trunk(data: Path, trunk: Path, tmp_path: Path) -> None:
    first = settings(data, tmp_path / "first", init={"checkpoint": trunk, "freeze_trunk": True})
    train(first)
    stage_one = first.run_dir / "export" / "sequential"
    assert not any("attention.dense" in name and "temporal" not in name for name in _own_names(stage_one))
    assert (first.run_dir / "export" / "trunk" / "manifest.json").read_bytes() == (trunk / "manifest.json").read_bytes()
    init = {"checkpoint": stage_one, "freeze_trunk": True, "temporal": "copy"}
    second = settings(data, tmp_path / "second", "interpolation", init=init, train={"steps": 1}, optimiser={"lr": 1e-9})
    train(second)
    one, two = load_model(stage_one), load_model(second.run_dir / "export" / "interpolation")
    assert two.config.task == "interpolation"
    for (name, before), after in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(before, after, atol=1e-6, rtol=0, msg=name)


def test_a_non_finite_step_is_skipped_and_many_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = 0
    bad_forwards = {5, 6}  # the two micro-batches of the third step
    real = trainer.ClipTask

    class NonFinite(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            forward = self.objective.forward

            def non_finite(batch):
                nonlocal forwards
                forwards += 1
                loss, metrics = forward(batch)
                return LossAndMetrics(loss * float("nan") if forwards in bad_forwards else loss, metrics)

            self.objective.forward = non_finite

    monkeypatch.setattr(trainer, "ClipTask", NonFinite)
    config = settings(data, tmp_path / "run")
    last = train(config)
    assert last["skipped"] == 1
    assert [line["step"] for line in read_metrics(config.run_dir) if line.get("loss") is None] == [3]
    forwards, bad_forwards = 0, set(range(1, 100))
    with pytest.raises(ValueError, match="3 steps in a row"):
        train(settings(data, tmp_path / "all_bad", train={"max_bad_steps": 3}))
    assert not (tmp_path / "all_bad" / "checkpoints").exists()


@pytest.mark.parametrize("part", ["loss", "gradients"])
def test_fp16_lowers_its_scale_for_overflow_alone(
    part: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN that no scale avoids is counted, and ends the run; of gradients, once the scale cannot be lower."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    scales, real = list[float](), trainer.Trainer.train_step

    def train_step(self: trainer.Trainer, batch: object) -> trainer.StepResult:
        scaler = self.engine.optimizer.loss_scaler
        if not scales:
            scaler.cur_scale, scaler.cur_hysteresis = 4.0, 1
            forward = self.task.objective.forward

            def non_finite(batch: object) -> LossAndMetrics:
                loss, metrics = forward(batch)
                if part == "loss":
                    return LossAndMetrics(loss * float("nan"), metrics)
                loss.register_hook(lambda gradient: gradient * float("nan"))
                return LossAndMetrics(loss, metrics)

            self.task.objective.forward = non_finite
        result = real(self, batch)
        scales.append(scaler.cur_scale)
        return result

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    numbers = {"dtype": "fp16", "weights": "dtype", "max_bad_steps": 3, "steps": 9}
    with pytest.raises(ValueError, match="3 steps in a row had a NaN or infinite loss or gradient"):
        train(settings(data, tmp_path / "run", train=numbers))
    assert scales == ([4.0] * 3 if part == "loss" else [2.0, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops(
    data: Path, trunk: Path, whole_run: Callable[[str, bool], TrainConfig], tmp_path: Path, number: int
) -> None:
    steps = 0

    class Terminating(trainer.Trainer):
        def train_step(self, batch):
            nonlocal steps
            steps += 1
            if steps == 2:
                signal.raise_signal(number)
            return super().train_step(batch)

    whole, stopped = whole_run("fp32", False), settings(data, tmp_path / "stopped", **from_trunk("fp32", trunk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Trainer", Terminating)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as interruption:
            train(stopped)
    if number == signal.SIGINT:
        assert interruption.type is KeyboardInterrupt
    else:
        assert interruption.value.code == 128 + number
    assert (stopped.run_dir / "checkpoints" / "latest").read_text().strip() == "step_00000002"
    train(stopped, resume=True)
    assert read_metrics(whole.run_dir) == read_metrics(stopped.run_dir)


def test_an_incomplete_export_is_written_again(data: Path, trunk: Path, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and its export, or while the trunk was copied."""
    config = settings(data, tmp_path / "run", init={"checkpoint": trunk, "freeze_trunk": True})
    train(config)
    exported = config.run_dir / "export"
    exported_digest = digest(exported / "sequential")
    (exported / "trunk" / "manifest.json").unlink()
    shutil.rmtree(exported / "sequential")
    (exported / ".sequential.abcd1234.tmp").mkdir()
    train(config, resume=True)
    assert digest(exported / "sequential") == exported_digest
    assert (exported / "trunk" / "manifest.json").read_bytes() == (trunk / "manifest.json").read_bytes()
    assert sorted(place.name for place in exported.iterdir()) == ["sequential", "trunk"]


def test_temporary_files_of_a_killed_run_are_removed_from_all_its_folders(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "run")
    train(config)
    before = sorted(config.run_dir.rglob("*"))
    (config.run_dir / "checkpoints/.latest.abcd1234.tmp").touch()
    (config.run_dir / "export/.image_tokenizer.abcd1234.tmp").mkdir()
    (config.run_dir / ".config.abcd1234.tmp.yaml").touch()
    train(config, resume=True)
    assert sorted(config.run_dir.rglob("*")) == before


def test_changed_settings_are_logged_on_resume(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(data, tmp_path / "run", train={"stop_at": 2}))
    capsys.readouterr()
    train(settings(data, tmp_path / "run", train={"seed": 7, "recompute": "layer"}), resume=True)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "continues with" in line]
    assert len(warnings) == 1 and "train.seed=" in warnings[0] and warnings[0].endswith("continues with 7")


@pytest.mark.parametrize(("dropout", "warns"), [(0.1, True), (0.0, False)])
def test_other_micro_batches_change_dropout_and_say_so(
    dropout: float, warns: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"dropout": dropout, "attention_dropout": 0.0}
    for stop, size in ((1, 4), (2, 4), (3, 2)):
        assert "micro-batches" not in capsys.readouterr().err
        groups = {"model": model, "train": {"stop_at": stop, "micro_batch_size": size}}
        train(settings(data, tmp_path / "run", **groups), resume=True)
    said = "micro-batches per step changed from 2 to 4," in (errors := capsys.readouterr().err)
    assert (said, "set train.micro_batch_size=4 " in errors) == (warns, warns)


def test_a_codebook_that_is_not_made_yet_is_made_at_the_new_step(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recipes decide when it is made after a few steps, which is no change of what was learned."""
    for stop, continuous, warns in ((1, 4, False), (2, 3, False), (4, 3, False), (5, 2, True)):
        groups = {"train": {"steps": 6, "stop_at": stop}, "tokenizer": {"continuous_steps": continuous}}
        train(settings(data, tmp_path / "run", "tokenizer", **groups), resume=True)
        assert ("tokenizer.continuous_steps=3 so far and continues with 2" in capsys.readouterr().err) == warns


WRONG = {
    "task=image (it was sequential)": ("image", {}),
    "model.num_heads=4 (it was 2)": ("sequential", {"model": {"num_heads": 4}}),
    "model.window_size=3 (it was None)": ("sequential", {"model": {"window_size": 3}}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_run_is_not_resumed_as_another_function(message: str, data: Path, tmp_path: Path) -> None:
    """Shapes would fit, so nothing else would notice."""
    train(settings(data, tmp_path / "run", train={"stop_at": 1}))
    before = sorted((tmp_path / "run").rglob("*"))
    task, groups = WRONG[message]
    with pytest.raises(ValueError, match=f"cannot be resumed with .*{re.escape(message)}.*; resume it with those"):
        train(settings(data, tmp_path / "run", task, **groups), resume=True)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_keys_that_an_older_run_did_not_have_are_no_change() -> None:
    now = to_dict(TrainConfig())
    older = {name: value for name, value in now.items() if name != "export"}
    older["train"] = {name: value for name, value in now["train"].items() if name not in ("ema_decay", "compile")}
    older["optimiser"] = {name: value for name, value in now["optimiser"].items() if name != "schedule"}
    assert not list(changed_settings(older, now))


def test_a_non_finite_step_leaves_the_codebook_unchanged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, micro_batches = trainer.TokenizerTask, 0

    class NonFinite(real):  # type: ignore[misc, valid-type]
        def micro_batch(self, batch, index, count):
            nonlocal micro_batches
            micro_batches += 1
            images = super().micro_batch(batch, index, count)
            return images * float("nan") if micro_batches == 7 else images  # in the fourth step, with a codebook

    monkeypatch.setattr(trainer, "TokenizerTask", NonFinite)
    config = settings(data, tmp_path / "run", "tokenizer")
    assert train(config)["skipped"] == 1
    quantizer = ImageTokenizer.load(config.run_dir / "export" / "image_tokenizer").model.quantize
    assert all(tensor.isfinite().all() for tensor in quantizer.state_dict().values())


BAD = {
    "data.path is not set": {"data": {"path": None}},
    "model.frame_side": {"model": {"frame_side": 2}},
    "cannot be divided": {"train": {"micro_batch_size": 3}},
    "set init.checkpoint": {"init": {"freeze_trunk": True}},
    "int8 cannot be trained": {"init": {"trunk_weights": "int8"}},
    "cannot partition int8": {"init": {"trunk_weights": "int8", "freeze_trunk": True}, "deepspeed": {"stage": 3}},
    "no clips of": {"data": {"clip_seconds": [8.0]}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_are_a_one_line_error_before_anything_is_written(message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(settings(data, tmp_path / "run", **BAD[message]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(data: Path, trunk: Path, tmp_path: Path) -> None:
    for model in ({"hidden_size": 32}, {"num_layers": 3}):
        with pytest.raises(ValueError, match="does not fit the model"):
            train(settings(data, tmp_path / "run", init={"checkpoint": trunk}, model=_small() | model))
    with pytest.raises(ValueError, match=r"^init\.checkpoint: no checkpoint folder"):
        train(settings(data, tmp_path / "run", init={"checkpoint": tmp_path / "nowhere"}))
    assert not (tmp_path / "run").exists()


def test_frozen_weights_of_another_type_are_named(data: Path, trunk: Path, tmp_path: Path) -> None:
    init = {"checkpoint": trunk, "freeze_trunk": True}
    train(settings(data, tmp_path / "run", init=init, train={"stop_at": 1}))
    low = {"dtype": "bf16", "weights": "dtype"}
    message = (
        r"with train\.weights=fp32 train\.dtype=fp32, .* this run has train\.weights=dtype train\.dtype=bf16; resume "
        r"it with train\.weights=fp32"
    )
    with pytest.raises(ValueError, match=message):
        train(settings(data, tmp_path / "run", init=init, train=low), resume=True)
    train(settings(data, tmp_path / "run", init=init, train={"stop_at": 2, "dtype": "bf16"}), resume=True)


def test_a_run_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "run", train={"steps": 1})
    train(config)
    with pytest.raises(ValueError, match="--resume"):
        train(config)


def _small() -> dict[str, int]:
    names = (
        "num_layers",
        "hidden_size",
        "num_heads",
        "text_len",
        "frame_side",
        "frame_position_start",
        "num_positions",
    )
    model = settings(Path("x"), Path("y")).model
    return {name: getattr(model, name) for name in names}


def _own_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())
