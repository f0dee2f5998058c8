"""Budgets: counts are exact, estimates move the right way with the settings."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from cogvideo.checkpoint.load import on_meta
from cogvideo.config import load_config
from cogvideo.inference.backends import KVCache
from cogvideo.model.config import LoraConfig, ModelConfig, TrunkWeights
from cogvideo.model.lora import add_adapters
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.planning.budgets import (
    TrainingBudget,
    TrainingSettings,
    sampling_budget,
    suggestions,
    trained_and_all_parameters,
    training_budget,
)
from cogvideo.planning.counts import (
    attention_pairs,
    cache_bytes,
    count_parameters,
    quantized_trunk_size,
    superres_training_flops,
)
from cogvideo.planning.machines import MACHINES, measure_machine
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.training.config import TrainConfig
from tests.helpers.models import VARIANTS, tiny_config
from tests.helpers.superres import TINY_CONFIGS

A100 = MACHINES["a100-80"]
CONFIGS = Path(__file__).parents[3] / "configs" / "model"


def published(**settings: Any) -> TrainingBudget:
    return training_budget(ModelConfig(), A100, TrainingSettings(**settings))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts_match_the_model(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    model = CogVideoTransformer(config)
    counts = count_parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    extra = config.num_extra_positions * config.hidden_size
    assert counts.temporal + extra == sum(p.numel() for _, p in model.extra_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_size_is_what_is_allocated(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    cache = KVCache.allocate(config, batch=3, text_len=config.text_len, spatial_capacity=config.frame_len)
    assert cache_bytes(config, 3, bytes_per_value=4) == cache.num_bytes


def test_published_model_size() -> None:
    config = ModelConfig()
    counts = count_parameters(config)
    assert counts.total == 7_721_127_936
    assert counts.temporal == 1_812_676_608
    sampling = sampling_budget(config, A100)
    assert sampling.tokens_per_clip == 1600
    assert 14e9 < sampling.weights < 16e9
    assert 0.005 < sampling.seconds_per_token < 0.05


def test_attention_pairs_cover_all_allowed_pairs() -> None:
    config = tiny_config("interpolation", window_size=2)
    n, frames, text = 16, 5, config.text_len
    assert attention_pairs(config) >= 2 * n * frames * text + frames * n * (n + 1) // 2


def test_zero_stages_partition_optimiser_gradients_and_weights() -> None:
    whole, one, two, three = (published(count=8, zero_stage=stage) for stage in range(4))
    assert one.optimiser == whole.optimiser / 8
    assert (one.gradients, two.gradients) == (whole.gradients, whole.gradients / 8)
    assert (two.weights, three.weights) == (whole.weights, whole.weights / 8)


def test_averages_of_weights_are_partitioned_and_offloaded_with_the_optimiser() -> None:
    trained = published().optimiser / 12
    assert published(ema=True).optimiser == published().optimiser + 4 * trained
    assert published(ema=True, count=8).optimiser == 2 * trained
    offloaded = [published(ema=ema, offload_optimizer=True) for ema in (False, True)]
    assert (offloaded[1].host - offloaded[0].host, offloaded[1].optimiser) == (4 * trained, 0)
    assert published(ema=True).seconds_per_step > published().seconds_per_step


def test_a_frozen_trunk_costs_less() -> None:
    frozen, free = (published(frozen_trunk=frozen) for frozen in (True, False))
    assert frozen.optimiser == pytest.approx(12 * 1_818_820_608)
    assert frozen.total < free.total / 2
    assert frozen.seconds_per_step < free.seconds_per_step


@pytest.mark.parametrize("stored", ["int8", "float8"])
def test_quantized_trunk_size_matches_the_model(stored: Literal["int8", "float8"]) -> None:
    config = tiny_config(**VARIANTS["sequential"])
    model = CogVideoTransformer(config)
    full = sum(p.nbytes for p in model.parameters())
    model.freeze_trunk()
    model.quantize_trunk(stored)
    quantized = [p for p in model.parameters() if p.itemsize == 1]
    scales = sum(buffer.nbytes for buffer in model.buffers())
    count, count_bytes = quantized_trunk_size(config)
    assert (count, count_bytes) == (sum(p.numel() for p in quantized), sum(p.nbytes for p in quantized) + scales)
    assert sum(p.nbytes for p in model.parameters()) + scales == full - 4 * count + count_bytes
    assert published().weights - published(trunk_weights=stored).weights == pytest.approx(5.9e9, rel=0.01)
    for wrong in ({"frozen_trunk": False}, {"zero_stage": 3}):
        with pytest.raises(ValueError, match=f"trunk_weights={stored} needs"):
            published(trunk_weights=stored, **wrong)


def test_products_with_a_float8_trunk_are_counted_where_the_gpu_has_them() -> None:
    """Half the time of the frozen trunk's products, and the time of rounding what they read."""

    def times(machine: str, **settings: Any) -> list[float]:
        held: tuple[TrunkWeights, ...] = ("full", "float8")
        budgets = [
            training_budget(ModelConfig(), MACHINES[machine], TrainingSettings(trunk_weights=x, **settings))
            for x in held
        ]
        return [budget.seconds_per_step for budget in budgets]

    in_bf16, in_float8 = times("rtx4090-24", recompute="nothing")
    config, clips, machine = ModelConfig(), 4, MACHINES["rtx4090-24"]
    text, slots = config.text_len, config.layout.num_slots
    # forward on all rows, backward on frames alone: 24 h h flops per row, of which half the time is saved
    h, layers, rows = config.hidden_size, config.num_layers, 2 * slots + text
    saved = clips * layers * rows * 12 * h * h / (machine.flops * 0.63)
    moved = clips * layers * h * ((slots + text) * (7 * 13 + 9 * 4) + slots * 9 * 23) + layers * 24 * h * h
    assert in_bf16 - in_float8 == pytest.approx(saved - moved / (machine.bandwidth * 0.84))

    def gain(machine: str, **settings: Any) -> float:
        full, float8 = times(machine, **settings)
        return full - float8

    assert gain("rtx4090-24", recompute="layer") > gain("rtx4090-24", recompute="mlp") > in_bf16 - in_float8 > 0
    assert gain("a100-80") == 0
    assert gain("rtx4090-24", weights="fp32", products="fp32") == 0


def test_recomputing_layers_trades_time_for_memory() -> None:
    kept, mlp, layer = (published(recompute=what) for what in ("nothing", "mlp", "layer"))
    assert layer.activations < kept.activations / 5
    assert layer.activations < mlp.activations < kept.activations * 0.75
    assert layer.seconds_per_step > mlp.seconds_per_step > kept.seconds_per_step


@pytest.mark.parametrize("name", ["dsr", "itersr"])
def test_superres_training_flops_at_published_size(name: str) -> None:
    """Six flops per parameter and row if nothing is frozen; a frozen trunk saves the context's backward pass."""
    config = load_config(TrainConfig, [CONFIGS / f"cogview2_{name}.yaml"], ["task=superres"]).superres
    rows = config.high_res_len + config.text_len + config.low_res_len
    flops = sum(superres_training_flops(config, frozen_trunk=config.method == "direct"))
    assert 0.6 < flops / (6 * 5.44e9 * rows) < 1.1


def test_this_machine_is_measured() -> None:
    machine = measure_machine()
    assert machine.memory_bytes > 1e9
    assert 0 < machine.flops < 1e17 and 0 < machine.bandwidth < 1e14  # a busy machine may be slow


def test_adapters_are_counted_as_a_model_has_them() -> None:
    lora = LoraConfig(rank=3, targets=("spatial", "mlp", "embeddings"))
    for config in (tiny_config(), TINY_CONFIGS["direct"], TINY_CONFIGS["iterative"]):
        kind = SuperresTransformer if isinstance(config, SuperresConfig) else CogVideoTransformer
        model = on_meta(partial(kind, config))
        add_adapters(model, lora)
        trained, total = trained_and_all_parameters(config, TrainingSettings(lora=lora))
        assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert total == sum(p.numel() for p in model.parameters())


def test_a_full_size_stage_with_adapters_and_an_int8_trunk_fits_24_gb_without_offloading() -> None:
    settings = TrainingSettings(
        micro_batch=1, recompute="layer", trunk_weights="int8", frozen_trunk=False, lora=LoraConfig(rank=16)
    )
    machine = MACHINES["rtx4090-24"]
    assert training_budget(ModelConfig(), machine, settings).fits(machine)
    whole = replace(settings, lora=LoraConfig(), frozen_trunk=True)
    assert not training_budget(ModelConfig(), machine, whole).fits(machine)
    assert any(tried.trunk_weights == "int8" for tried, _ in suggestions(ModelConfig(), machine, settings))


@pytest.mark.parametrize("count", [3, 8, 500])
def test_suggested_micro_batches_divide_the_batch(count: int) -> None:
    found = suggestions(ModelConfig(), MACHINES["h100-80"], TrainingSettings(count=count))
    assert found
    for tried, _ in found:
        assert tried.batch_size and tried.batch_size % (tried.count * tried.micro_batch) == 0
