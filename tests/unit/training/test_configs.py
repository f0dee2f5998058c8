"""configs/deepspeed and configs/train: every file loads, and full-size runs fit the machines they are meant for."""

from pathlib import Path

import pytest

from cogvideo.config import load_config
from cogvideo.planning.budgets import USABLE_MEMORY, TrainingBudget, training_budget
from cogvideo.planning.machines import MACHINES
from cogvideo.planning.report import format_bytes, format_duration
from cogvideo.training.config import TrainConfig
from cogvideo.training.deepspeed_engine import deepspeed_settings
from cogvideo.training.resources import planned_settings, resolve_auto

CONFIGS = Path(__file__).parents[3] / "configs"
HOST_BYTES = {"1x24gb": 64e9, "1x80gb": 128e9, "8x80gb": 512e9, "8x141gb": 512e9, "13x8x80gb": 512e9}
"""Machine files, and the CPU memory of a computer of theirs."""
STAGES = ("paper_stage1", "paper_stage2")


def load(stage: str, machine: str, *words: str) -> TrainConfig:
    return load_config(TrainConfig, [CONFIGS / f"train/{stage}.yaml", CONFIGS / f"deepspeed/{machine}.yaml"], words)


def plan(stage: str, machine: str, *words: str) -> tuple[TrainConfig, TrainingBudget]:
    """A config with `auto` resolved for the machine that its file names, and its budget there."""
    config = load(stage, machine, *words)
    assert config.machine.gpu is not None
    gpu, count = MACHINES[config.machine.gpu], config.machine.count
    resolved = resolve_auto(config, gpu, count)
    return resolved, training_budget(config.model, gpu, planned_settings(resolved, count))


def test_every_machine_file_is_covered_here() -> None:
    """1x24gb_lora needs a config that finetunes: tests/integration/test_recipe_guide.py plans it."""
    assert {path.stem for path in (CONFIGS / "deepspeed").glob("*.yaml")} == {*HOST_BYTES, "cpu", "1x24gb_lora"}


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_config_loads(path: Path) -> None:
    load_config(TrainConfig, [path])
    load_config(TrainConfig, [path, CONFIGS / "deepspeed/cpu.yaml"])


@pytest.mark.parametrize("machine", HOST_BYTES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_full_size_fits(stage: str, machine: str) -> None:
    config, budget = plan(stage, machine)
    count = config.machine.count
    assert config.machine.gpu is not None and budget.fits(MACHINES[config.machine.gpu])
    assert budget.host * min(count, 8) < HOST_BYTES[machine] * USABLE_MEMORY
    settings = deepspeed_settings(config, count)
    assert settings["bf16"] == {"enabled": True}
    micro, accumulation = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    assert micro * accumulation * count == 416


def test_a_frozen_trunk_is_not_recomputed_on_large_gpus_and_its_gradients_are_reduced_once() -> None:
    for machine in ("8x80gb", "8x141gb", "1x80gb"):
        config, _ = plan("paper_stage1", machine)
        assert config.train.recompute == "nothing" and config.deepspeed.stage == 1
        assert deepspeed_settings(config, config.machine.count)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert plan("paper_stage1", "1x24gb")[0].train.recompute == "layer"


@pytest.mark.parametrize("machine", HOST_BYTES)
def test_the_documented_memory_table_matches_the_planner(machine: str) -> None:
    lines = (CONFIGS.parent / "docs/guides/pretrain.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{machine}.yaml`")]
    config, budget = plan("paper_stage1", machine)
    host = f" + {format_bytes(budget.host)} of CPU memory" if budget.host else ""
    chosen = f"{config.train.micro_batch_size}, {config.train.recompute}"
    documented = [cell.strip() for cell in row.strip(" |").split("|")[2:]]
    assert documented == [chosen, format_bytes(budget.total) + host, format_duration(budget.seconds_per_step)]


def test_without_offloading_the_small_machine_is_too_small() -> None:
    words = ("train.micro_batch_size=1", "train.recompute=layer")
    _, budget = plan("paper_stage1", "1x24gb", *words, "deepspeed.offload_optimizer=false")
    assert budget.total > 24e9
    with pytest.raises(ValueError, match=r"nothing fits rtx4090-24 .* at least .* are needed"):
        plan("paper_stage1", "1x24gb", "deepspeed.offload_optimizer=false")


@pytest.mark.parametrize(
    ("words", "least"),
    [
        (("train.micro_batch_size=8",), "train.micro_batch_size=8 and train.recompute=layer"),
        (("train.recompute=mlp",), "train.micro_batch_size=1 and train.recompute=mlp"),
    ],
)
def test_what_would_need_least_is_named_where_nothing_fits(words: tuple[str, ...], least: str) -> None:
    with pytest.raises(ValueError, match=f"nothing fits .* are needed, with {least}; see"):
        plan("paper_stage1", "1x24gb", "deepspeed.offload_optimizer=false", *words)


def test_the_planner_knows_autocast_and_attention() -> None:
    """Of autocast's own, a copy of each weight does not grow with the micro-batch."""
    words = ("train.weights=fp32", "train.micro_batch_size=4", "train.recompute=nothing")
    autocast, fp32, blocks = (
        plan("paper_stage1", "8x141gb", *words, word)[1].activations
        for word in ("train.dtype=bf16", "train.dtype=fp32", "train.attention=sdpa")
    )
    assert autocast < 0.85 * fp32 and blocks > 1.1 * autocast


def test_auto_keeps_what_is_given() -> None:
    config, _ = plan("paper_stage1", "8x80gb", "train.micro_batch_size=13")
    assert (config.train.micro_batch_size, config.train.recompute) == (13, "layer")
    config, _ = plan("paper_stage1", "8x80gb", "train.recompute=mlp")
    assert config.train.recompute == "mlp" and config.train.micro_batch_size == 4
    with pytest.raises(ValueError, match="not resolved yet"):
        deepspeed_settings(load("paper_stage1", "8x80gb"), 8)
    with pytest.raises(ValueError, match="cannot be divided among 5 processes"):
        resolve_auto(load("paper_stage1", "8x80gb"), MACHINES["h100-80"], 5)


def test_an_int8_trunk_needs_less_memory() -> None:
    for words in ((), ("train.weights=fp32", "train.recompute=layer", "train.micro_batch_size=1")):
        full, int8 = (
            plan("paper_stage1", "8x141gb", *words, f"init.trunk_weights={held}")[1] for held in ("full", "int8")
        )
        assert full.weights - int8.weights == pytest.approx((3 if words else 1) * 5.9e9, rel=0.01)


def test_int8_weights_are_refused_with_zero_3() -> None:
    words = ("deepspeed.stage=3", "init.trunk_weights=int8", "train.micro_batch_size=1")
    with pytest.raises(ValueError, match="cannot partition int8 weights"):
        deepspeed_settings(load("paper_stage1", "8x80gb", *words), 8)


@pytest.mark.parametrize("own", ['{"zero_optimization": {"stage": 3}}', '{"train_batch_size": 7}', '{"bf16": {}}'])
def test_a_deepspeed_file_may_not_set_what_the_config_determines(own: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(own)
    with pytest.raises(ValueError, match=r"follows from .*leave it out here"):
        deepspeed_settings(
            load("paper_stage1", "8x80gb", "train.micro_batch_size=1", f"deepspeed.file={tmp_path / 'own.json'}"), 8
        )


def test_layers_that_cannot_be_compiled_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^train.compile=true .* deepspeed.stage=3 gathers; use deepspeed.stage=0, 1 or 2"
    ):
        load("paper_stage1", "8x80gb", "train.compile=true", "deepspeed.stage=3")
    with pytest.raises(ValueError, match=r"^train.compile=true .* leave it out for task=tokenizer"):
        load("paper_stage1", "8x80gb", "train.compile=true", "task=tokenizer")
    assert load("paper_stage1", "8x80gb", "train.compile=true").train.compile


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=tokenizer"], "init.codebook initialises a transformer's embeddings; leave it out for task=tokenizer"),
        (["init.checkpoint=trunk"], "init.checkpoint has embeddings of its own; leave out init.codebook=true"),
        (["data.image_tokenizer=null"], "init.codebook=true needs the codes; set data.image_tokenizer to the one"),
    ],
)
def test_codebooks_without_a_use_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("tiny_image", "cpu", "init.codebook=true", *words)
    assert load("tiny_image", "cpu", "init.codebook=true").init.codebook


def test_clips_made_at_the_start_take_the_place_of_prepared_ones() -> None:
    with pytest.raises(ValueError, match=r"data.embedded_clips=48 is for training without data.path, which is set too"):
        load("debug", "cpu", "data.path=clips")
    assert load("debug", "cpu", "data.path=clips", "data.embedded_clips=null").data.embedded_clips is None


def test_training_the_trunk_fits_eight_gpus() -> None:
    for stage in (1, 2):
        config, budget = plan("paper_stage1", "8x80gb", "init.freeze_trunk=false", f"deepspeed.stage={stage}")
        assert budget.fits(MACHINES["h100-80"]) and not planned_settings(config, 8).frozen_trunk


def test_paper_configs_have_the_published_optimisation() -> None:
    config = load("paper_stage1", "13x8x80gb")
    assert (config.optimiser.lr, config.optimiser.betas, config.optimiser.grad_clip) == (2e-4, (0.9, 0.95), 0.1)
    assert config.init.freeze_trunk and config.init.temporal == "qkv"
    assert plan("paper_stage1", "13x8x80gb")[0].train.accumulation(104) == 1
    assert load("paper_stage2", "13x8x80gb").model.window_size == 10
