"""The moving average of weights: that of the slow form, resumed bitwise, and what is validated, drawn and exported.

That of several processes is in test_train_processes.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.files import read_json
from cogvideo.training import trainer
from cogvideo.training.launch import train
from cogvideo.training.optimiser import ema_decay_after
from cogvideo.training.tasks.base import LossAndMetrics
from tests.helpers.training import prepare_data, read_averages, read_metrics, settings

DECAY = 0.6
LAST = Path("checkpoints/step_00000006")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def bases(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for task in ("image", "sequential"):
        train(settings(data, folder / task, task, train={"steps": 1}))
    return {"trunk": folder / "image/export/trunk", "stage 1": folder / "sequential/export/sequential"}


LOW = {"dtype": "bf16", "weights": "dtype"}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "zero 1": {"deepspeed": {"stage": 1}},
    "zero 2, bf16 weights": {"deepspeed": {"stage": 2}, "train": LOW},
    "zero 2, offloaded": {"deepspeed": {"stage": 2, "offload_optimizer": True}},
    "zero 3": {"deepspeed": {"stage": 3}},
    "zero 3, bf16 weights": {"deepspeed": {"stage": 3}, "train": LOW},
    "fp16 weights": {"train": {"dtype": "fp16", "weights": "dtype"}},
    "frozen trunk": {"init": {"freeze_trunk": True}},
    "adapters": {"lora": {"rank": 2}},
}


def groups_of(variant: str, bases: dict[str, Path], **train_settings: Any) -> dict[str, Any]:
    """Settings of a run that is averaged, unless `ema_decay` says otherwise, and validated at every step."""
    chosen = VARIANTS[variant]
    base = bases["stage 1" if "lora" in chosen else "trunk"]
    return chosen | {
        "init": chosen.get("init", {}) | {"checkpoint": base},
        "train": {"ema_decay": DECAY} | chosen.get("train", {}) | train_settings,
        "log": {"validate_every": 1, "validation_batches": 1},
    }


class Recorder:
    """Averages the whole weights of a run beside it, step by step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.averages: dict[str, Tensor] = {}
        self.updates = 0
        recorder = self

        class Recording(trainer.Trainer):
            def train_step(self, batch: Any) -> trainer.StepResult:
                if not recorder.averages:
                    recorder.averages = recorder.weights(self)
                result = super().train_step(batch)
                if result.is_finite and not result.overflowed:
                    recorder.add(recorder.weights(self))
                return result

        patch.setattr(trainer, "Trainer", Recording)

    @staticmethod
    def weights(of: trainer.Trainer) -> dict[str, Tensor]:
        names = [name for name in of.state.infos() if name.startswith("weights/")]
        return {name.removeprefix("weights/"): of.state.read(name).double().clone() for name in names}

    def add(self, weights: dict[str, Tensor]) -> None:
        decay = ema_decay_after(self.updates, DECAY)
        self.averages = {name: decay * old + (1 - decay) * weights[name] for name, old in self.averages.items()}
        self.updates += 1


def hashes(checkpoint: Path) -> dict[str, str]:
    """Of all its tensors."""
    return read_json(checkpoint / "manifest.json")["tensors"]


@pytest.mark.slow
@pytest.mark.usefixtures("fp16_on_cpu")
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_that_of_the_slow_form_and_resumes_bitwise(
    variant: str, data: Path, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, validated = groups_of(variant, bases), {"data": {"validation": str(data / "clips")}}
    whole, parts = (settings(data, tmp_path / name, **groups, **validated) for name in ("whole", "parts"))
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        train(whole)
    found = read_averages(whole.run_dir / LAST)
    assert found.keys() == recorder.averages.keys() and recorder.updates
    for name, average in found.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), recorder.averages[name], rtol=1e-6, atol=1e-8, msg=name)

    train(settings(data, tmp_path / "parts", **groups_of(variant, bases, stop_at=3), **validated))
    train(parts, resume=True)
    assert read_metrics(parts.run_dir) == read_metrics(whole.run_dir)
    assert hashes(parts.run_dir / LAST) == hashes(whole.run_dir / LAST)
    exports = [next((c.run_dir / "export").glob("[sa]*/*model.safetensors")).read_bytes() for c in (whole, parts)]
    assert exports[0] == exports[1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp32", "zero 2, bf16 weights", "zero 3"])
def test_what_is_trained_does_not_depend_on_it(
    variant: str, data: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Though every step is followed by a validation and a sample sheet, for which weights and averages are swapped."""
    tensors = []
    for name, decay in (("averaged", DECAY), ("plain", None)):
        groups = groups_of(variant, bases, ema_decay=decay, steps=3, stop_at=None)
        groups["log"] |= {"preview_every": 1}
        train(settings(data, tmp_path / name, **groups, data={"validation": str(data / "clips")}))
        assert len(list((tmp_path / name / "previews").glob("step_*.png"))) == (0 if variant == "zero 3" else 3)
        of_all = hashes(tmp_path / name / "checkpoints/step_00000003")
        tensors.append({tensor: sha for tensor, sha in of_all.items() if not tensor.startswith("ema/")})
    assert tensors[0] == tensors[1]


def test_validation_and_exports_use_it(data: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """A run from the export, without a step of its own that matters, has the loss that was logged as validation's."""
    validated = {"data": {"validation": str(data / "clips")}}
    config = settings(data, tmp_path / "run", **groups_of("fp32", bases), **validated)
    train(config)
    exported = load_checkpoint(tmp_path / "run/export/sequential").tensors()
    averages = {name.removeprefix("model."): tensor for name, tensor in read_averages(config.run_dir / LAST).items()}
    assert exported.keys() == averages.keys()
    assert all(torch.equal(exported[name], average) for name, average in averages.items())

    logged = [line["validation/loss"] for line in read_metrics(config.run_dir) if "validation/loss" in line][-1]
    again = settings(
        data,
        tmp_path / "again",
        **groups_of("fp32", bases, ema_decay=None, steps=1)
        | {"init": {"checkpoint": tmp_path / "run/export/sequential"}, "optimiser": {"lr": 1e-12, "warmup_steps": 0}},
        **validated,
    )
    train(again)
    assert read_metrics(again.run_dir)[-1]["validation/loss"] == pytest.approx(logged, abs=1e-6)


def test_exports_can_hold_the_last_weights(data: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """export.weights may change from run to run: a finished one that is resumed exports again."""
    train(settings(data, tmp_path / "run", **groups_of("fp32", bases)))
    plain = settings(data, tmp_path / "plain", **groups_of("fp32", bases, ema_decay=None))
    train(plain)
    file = tmp_path / "run/export/sequential/model.safetensors"
    averaged = file.read_bytes()
    train(settings(data, tmp_path / "run", **groups_of("fp32", bases), export={"weights": "last"}), resume=True)
    assert file.read_bytes() == (plain.run_dir / "export/sequential/model.safetensors").read_bytes() != averaged


def test_skipped_steps_do_not_move_it(
    data: Path, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, forwards = trainer.ClipTask, 0

    class NonFinite(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            forward = self.objective.forward

            def non_finite(batch: Any) -> LossAndMetrics:
                nonlocal forwards
                forwards += 1
                loss, metrics = forward(batch)
                return LossAndMetrics(loss * float("nan") if forwards == 6 else loss, metrics)

            self.objective.forward = non_finite

    monkeypatch.setattr(trainer, "ClipTask", NonFinite)
    recorder = Recorder(monkeypatch)
    assert train(settings(data, tmp_path / "run", **groups_of("zero 1", bases)))["skipped"] == 1
    assert recorder.updates == 5
    for name, average in read_averages(tmp_path / "run" / LAST).items():
        torch.testing.assert_close(average.double(), recorder.averages[name], rtol=1e-6, atol=1e-8, msg=name)


def test_a_resumed_run_can_start_and_drop_it(data: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    train(settings(data, tmp_path / "run", **groups_of("zero 1", bases, ema_decay=None, stop_at=3)))
    train(settings(data, tmp_path / "run", **groups_of("zero 1", bases, stop_at=4)), resume=True)
    assert any(name.startswith("ema/") for name in hashes(tmp_path / "run/checkpoints/step_00000004"))
    train(settings(data, tmp_path / "run", **groups_of("zero 1", bases, ema_decay=None)), resume=True)
    train(settings(data, tmp_path / "plain", **groups_of("zero 1", bases, ema_decay=None)))
    assert hashes(tmp_path / "run" / LAST) == hashes(tmp_path / "plain" / LAST)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_impossible_decays_are_refused(decay: float, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.ema_decay=.*expected 0 or more, and below 1"):
        settings(data, tmp_path / "run", train={"ema_decay": decay})


def test_the_image_tokenizer_has_none(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.ema_decay .* task=tokenizer"):
        settings(data, tmp_path / "run", "tokenizer", train={"ema_decay": 0.9})
