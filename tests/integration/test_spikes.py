"""Steps with a spike of the gradient norm: skipped, counted, and judged alike by a resumed run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo.files import read_json
from cogvideo.training import optimiser, trainer
from cogvideo.training.launch import train
from cogvideo.training.tasks.base import LossAndMetrics
from tests.helpers.training import prepare_data, read_metrics, settings

SPIKE, STEPS = 6, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A weight after each step of runs in which the loss of step SPIKE counts a thousand times; four norms suffice."""
    real, recorded = trainer.ClipTask, []

    class Spiky(real):  # type: ignore[misc, valid-type]
        def micro_batch(self, batch: Any, index: int, count: int) -> Any:
            self.objective.seen += 1
            return super().micro_batch(batch, index, count)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            forward, objective = self.objective.forward, self.objective
            objective.seen = 0

            def spiky(batch: Any) -> LossAndMetrics:
                loss, metrics = forward(batch)
                step = objective.first_step + (objective.seen + 1) // 2
                return LossAndMetrics(loss * 1000 if step == SPIKE else loss, metrics)

            objective.forward = spiky

        def batches(self, first_step: int) -> Any:
            self.objective.first_step = first_step
            return super().batches(first_step)

    class Recording(trainer.Trainer):
        def train_step(self, batch: Any) -> trainer.StepResult:
            result = super().train_step(batch)
            recorded.append(self.task.model.final_layernorm.weight.detach().clone())
            return result

    monkeypatch.setattr(optimiser, "MIN_NORMS", 4)
    monkeypatch.setattr(trainer, "ClipTask", Spiky)
    monkeypatch.setattr(trainer, "Trainer", Recording)
    return recorded


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_a_spike_is_skipped_and_a_resumed_run_does_the_same(
    stage: int, data: Path, tmp_path: Path, weights: list[torch.Tensor]
) -> None:
    groups: dict[str, Any] = {
        "model": {"num_layers": 1},
        "deepspeed": {"stage": stage},
        "train": {"steps": STEPS, "skip_spikes": 20.0},
    }
    whole, parts = (settings(data, tmp_path / name, **groups) for name in ("whole", "parts"))
    assert train(whole)["spikes"] == 1
    assert [line["spikes"] for line in read_metrics(whole.run_dir)] == [0.0] * (SPIKE - 1) + [1.0] * (STEPS - SPIKE + 1)
    assert torch.equal(weights[SPIKE - 1], weights[SPIKE - 2])
    assert not torch.equal(weights[SPIKE], weights[SPIKE - 1])

    train(settings(data, tmp_path / "parts", **groups | {"train": groups["train"] | {"stop_at": 4}}))
    train(parts, resume=True)
    assert read_metrics(parts.run_dir) == read_metrics(whole.run_dir)
    manifests = [read_json(c.run_dir / f"checkpoints/step_{STEPS:08d}/manifest.json") for c in (whole, parts)]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]


def test_without_the_rule_nothing_is_skipped(data: Path, tmp_path: Path, weights: list[torch.Tensor]) -> None:
    config = settings(data, tmp_path / "run", model={"num_layers": 1}, train={"steps": SPIKE + 1})
    assert train(config)["skipped"] == 0
    assert not torch.equal(weights[SPIKE - 1], weights[SPIKE - 2])
    assert "spikes" not in read_metrics(config.run_dir)[-1]


@pytest.mark.parametrize("factor", [1.0, -3.0, float("inf"), float("nan")])
def test_a_factor_that_skips_all_or_nothing_is_refused(factor: float, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.skip_spikes=.*expected above 1"):
        settings(data, tmp_path / "run", train={"skip_spikes": factor})
