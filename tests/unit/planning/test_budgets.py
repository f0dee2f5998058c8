"""The cost estimates: counts are exact, the rest moves the right way."""

from typing import Any

import pytest
import torch

from cogvideo.inference.cache import KVCache
from cogvideo.model.config import ModelConfig
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.planning import budgets as budget
from cogvideo.planning.budgets import (
    MACHINES,
    ParameterCounts,
    TrainingBudget,
    TrainingSettings,
    sampling_budget,
    training_budget,
)
from tests.helpers.models import VARIANTS, tiny_config

A100 = MACHINES["a100-80"]


def published(**settings: Any) -> TrainingBudget:
    return training_budget(ModelConfig(), A100, TrainingSettings(**settings))


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_those_of_the_model(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    model = CogVideoTransformer(config)
    counts = ParameterCounts.of(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    extra = config.num_extra_positions * config.hidden_size
    assert counts.temporal + extra == sum(p.numel() for _, p in model.added_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_is_that_which_is_allocated(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    cache = KVCache.allocate(config, batch=3, text_len=config.text_len, spatial_places=config.frame_len)
    assert budget.cache_bytes(config, 3, bytes_each=4) == cache.num_bytes


def test_published_size() -> None:
    config = ModelConfig()
    counts = ParameterCounts.of(config)
    assert counts.total == 7_721_127_936
    assert counts.temporal == 1_812_676_608
    sampling = sampling_budget(config, A100)
    assert sampling.tokens == 1600
    assert 14e9 < sampling.weights < 16e9
    assert 0.005 < sampling.seconds_a_token < 0.05


def test_scores_counted_exceed_those_used_by_little() -> None:
    config = tiny_config("interpolation", window_size=2)
    n, frames, text = 16, 5, config.text_len
    assert budget.score_pairs(config) >= 2 * n * frames * text + frames * n * (n + 1) // 2


def test_zero_partitions_what_it_says() -> None:
    whole, one, two, three = (published(count=8, zero_stage=stage) for stage in range(4))
    assert one.optimiser == whole.optimiser / 8
    assert (one.gradients, two.gradients) == (whole.gradients, whole.gradients / 8)
    assert (two.weights, three.weights) == (whole.weights, whole.weights / 8)


def test_a_frozen_trunk_costs_less() -> None:
    frozen, free = (published(frozen_trunk=frozen) for frozen in (True, False))
    assert frozen.optimiser == pytest.approx(12 * 1_818_820_608)
    assert frozen.total < free.total / 2
    assert frozen.seconds_a_step < free.seconds_a_step


def test_an_int8_trunk_takes_what_the_model_says() -> None:
    config = tiny_config(**VARIANTS["sequential"])
    model = CogVideoTransformer(config)
    full = sum(p.nbytes for p in model.parameters())
    model.freeze_trunk()
    model.narrow_trunk()
    narrow = [p for p in model.parameters() if p.dtype == torch.int8]
    scales = sum(buffer.nbytes for buffer in model.buffers())
    count, count_bytes = budget.int8_trunk(config)
    assert (count, count_bytes) == (sum(p.numel() for p in narrow), sum(p.nbytes for p in narrow) + scales)
    assert sum(p.nbytes for p in model.parameters()) + scales == full - 4 * count + count_bytes
    assert published().weights - published(trunk_weights="int8").weights == pytest.approx(5.9e9, rel=0.01)
    for wrong in ({"frozen_trunk": False}, {"zero_stage": 3}):
        with pytest.raises(ValueError, match="trunk_weights=int8 needs"):
            published(trunk_weights="int8", **wrong)


def test_recomputing_layers_trades_time_for_memory() -> None:
    kept, mlp, layer = (published(recompute=what) for what in ("nothing", "mlp", "layer"))
    assert layer.activations < kept.activations / 5
    assert layer.activations < mlp.activations < kept.activations * 0.75
    assert layer.seconds_a_step > mlp.seconds_a_step > kept.seconds_a_step


def test_measuring_this_machine() -> None:
    machine = budget.measure()
    assert machine.memory_bytes > 1e9
    assert machine.flops > 1e9
    assert machine.bandwidth > 1e8
