"""configs/deepspeed and configs/train: every file loads, and full-size runs fit the machines they are meant for."""

from pathlib import Path

import pytest

from cogvideo.config import load_config
from cogvideo.planning.budgets import USABLE_MEMORY
from cogvideo.planning.report import format_bytes
from cogvideo.training.config import TrainConfig
from cogvideo.training.deepspeed_engine import deepspeed_settings
from cogvideo.training.resources import estimate_memory

CONFIGS = Path(__file__).parents[3] / "configs"
MACHINES = {"1x24gb": (1, 24e9, 64e9), "8x80gb": (8, 80e9, 512e9), "13x8x80gb": (104, 80e9, 512e9)}
"""Number of processes, bytes of device memory, and bytes of host memory per eight processes."""
STAGES = ("paper_stage1", "paper_stage2")


def load(stage: str, machine: str, *words: str) -> TrainConfig:
    return load_config(TrainConfig, [CONFIGS / f"train/{stage}.yaml", CONFIGS / f"deepspeed/{machine}.yaml"], words)


def test_every_machine_file_is_covered_here() -> None:
    assert {path.stem for path in (CONFIGS / "deepspeed").glob("*.yaml")} == {*MACHINES, "cpu"}


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_config_loads(path: Path) -> None:
    load_config(TrainConfig, [path])
    load_config(TrainConfig, [path, CONFIGS / "deepspeed/cpu.yaml"])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_full_size_fits(stage: str, machine: str) -> None:
    config = load(stage, machine)
    world, device_bytes, host_bytes = MACHINES[machine]
    memory = estimate_memory(config, config.model, world)
    assert memory.device.total < device_bytes * USABLE_MEMORY, str(memory)
    assert memory.host * min(world, 8) < host_bytes * USABLE_MEMORY
    settings = deepspeed_settings(config, world)
    assert settings["zero_optimization"]["stage"] == 2 and settings["bf16"] == {"enabled": True}
    micro, accumulation = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    assert micro * accumulation * world == 416


@pytest.mark.parametrize("machine", MACHINES)
def test_the_documented_memory_table_matches_the_planner(machine: str) -> None:
    lines = (CONFIGS.parent / "docs/guides/pretrain.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if f"`{machine}.yaml`" in line]
    config = load("paper_stage1", machine)
    memory = estimate_memory(config, config.model, MACHINES[machine][0])
    parts = (memory.device.weights, memory.device.gradients, memory.device.optimiser, memory.device.activations)
    documented = [part.strip() for part in row.split("|")[-2].split("+") if "CPU" not in part]
    assert documented == [format_bytes(part) for part in parts if part]


def test_without_offloading_the_small_machine_is_too_small() -> None:
    config = load("paper_stage1", "1x24gb", "deepspeed.offload_optimizer=false")
    assert estimate_memory(config, config.model, 1).device.total > 24e9


def test_an_int8_trunk_needs_less_memory() -> None:
    for words in ((), ("train.weights=fp32",)):
        full, int8 = (
            estimate_memory(config, config.model, 1).device
            for config in (
                load("paper_stage1", "8x80gb", *words, "train.batch_size=4", f"init.trunk_weights={held}")
                for held in ("full", "int8")
            )
        )
        assert full.weights - int8.weights == pytest.approx((3 if words else 1) * 5.9e9, rel=0.01)


def test_int8_weights_are_refused_with_zero_3() -> None:
    with pytest.raises(ValueError, match="cannot partition int8 weights"):
        deepspeed_settings(load("paper_stage1", "8x80gb", "deepspeed.stage=3", "init.trunk_weights=int8"), 8)


@pytest.mark.parametrize("own", ['{"zero_optimization": {"stage": 3}}', '{"train_batch_size": 7}', '{"bf16": {}}'])
def test_a_deepspeed_file_may_not_set_what_the_config_determines(own: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(own)
    with pytest.raises(ValueError, match=r"follows from .*leave it out here"):
        deepspeed_settings(load("paper_stage1", "8x80gb", f"deepspeed.file={tmp_path / 'own.json'}"), 8)


def test_training_the_trunk_fits_eight_gpus() -> None:
    config = load("paper_stage1", "8x80gb", "init.freeze_trunk=false")
    assert estimate_memory(config, config.model, 8).device.total < 80e9 * USABLE_MEMORY


def test_paper_configs_have_the_published_optimisation() -> None:
    config = load("paper_stage1", "13x8x80gb")
    assert (config.optimiser.lr, config.optimiser.betas, config.optimiser.grad_clip) == (2e-4, (0.9, 0.95), 0.1)
    assert config.init.freeze_trunk and config.init.temporal == "qkv" and config.train.accumulation(104) == 1
    assert load("paper_stage2", "13x8x80gb").model.window_size == 10
