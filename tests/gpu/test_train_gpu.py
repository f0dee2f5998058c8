"""Training on a GPU in the types and ZeRO stages that need one, against float32 on the same GPU."""

from pathlib import Path
from typing import Any

import pytest

from cogvideo.training.config import TrainConfig
from cogvideo.training.launch import train
from tests.helpers.training import prepare_data, read_metrics, settings

pytestmark = pytest.mark.gpu

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"train": {"dtype": "bf16"}},
    "bf16_weights_zero2_offloaded": {
        "train": {"dtype": "bf16", "weights": "dtype"},
        "deepspeed": {"stage": 2, "offload_optimizer": True},
    },
    "bf16_weights_zero3": {"train": {"dtype": "bf16", "weights": "dtype"}, "deepspeed": {"stage": 3}},
    "fp16_zero2": {"train": {"dtype": "fp16", "weights": "dtype"}, "deepspeed": {"stage": 2}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run in float32."""
    config = settings(
        data, tmp_path_factory.mktemp("plain") / "run", train={"steps": 40}, log={"every": 10, "peak_tflops": None}
    )
    train(config)
    return config


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_dtype_trains_like_float32_and_resumes(
    variant: str, data: Path, plain: TrainConfig, tmp_path: Path
) -> None:
    groups = VARIANTS[variant]
    longer = groups | {"train": groups["train"] | {"steps": 40}, "log": {"every": 10}}
    whole, parts = (settings(data, tmp_path / name, **longer) for name in ("whole", "parts"))
    train(whole)
    train(settings(data, tmp_path / "parts", **longer | {"train": longer["train"] | {"stop_at": 15}}))
    train(parts, resume=True)
    expected, found = ([line["loss"] for line in read_metrics(c.run_dir)] for c in (whole, parts))
    assert found == pytest.approx(expected, rel=1e-2)  # kernels that add with atomics are not bitwise repeatable
    # fp16 skips its first steps while the loss scale falls, so only the end is compared
    assert read_metrics(whole.run_dir)[-1]["loss"] == pytest.approx(read_metrics(plain.run_dir)[-1]["loss"], abs=0.3)
