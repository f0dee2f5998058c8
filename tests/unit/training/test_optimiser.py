"""The learning-rate schedule, parameter groups, and the division into micro-batches."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cogvideo.model.config import ModelConfig
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.layout import Vocabulary
from cogvideo.training.config import LoopConfig, OptimiserConfig
from cogvideo.training.optimiser import (
    EMA,
    SpikeRule,
    ema_decay_after,
    learning_rate,
    make_optimiser,
    parameter_groups,
)


def small_model() -> CogVideoTransformer:
    vocabulary = Vocabulary(size=40, num_image_tokens=16, pad=20, newline=21, start_of_image=39)
    sizes = dict(num_layers=2, hidden_size=8, num_heads=2, text_len=6, frame_side=2, num_positions=16)
    return CogVideoTransformer(ModelConfig(**sizes, frame_position_start=8, vocabulary=vocabulary))


def test_the_learning_rate_warms_up_then_decays_to_its_minimum() -> None:
    config = OptimiserConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    assert [learning_rate(step, 10, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, 10, config) == 1.0
    assert learning_rate(7, 10, config) == pytest.approx(0.55)
    assert learning_rate(10, 10, config) == pytest.approx(0.1)


def test_a_constant_rate_stays_and_wsd_falls_at_the_end() -> None:
    constant = OptimiserConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 10, constant) for step in (0, 1, 2, 9, 100)] == [0.5, 1, 1, 1, 1]
    wsd = OptimiserConfig(lr=1.0, warmup_steps=2, schedule="wsd", min_lr_ratio=0.2, decay_fraction=0.4)
    rates = [learning_rate(step, 10, wsd) for step in (0, 1, 2, 6, 7, 8, 9, 10, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_wsd_does_not_depend_on_the_length_before_it_falls() -> None:
    """Why it is chosen: a run can be continued with more steps."""
    config = OptimiserConfig(warmup_steps=10, schedule="wsd")
    assert [learning_rate(s, 100, config) for s in range(80)] == [learning_rate(s, 1000, config) for s in range(80)]


@given(
    st.integers(0, 300),
    st.integers(1, 200),
    st.integers(0, 250),
    st.sampled_from(["cosine", "constant", "wsd"]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_learning_rate_stays_between_zero_and_its_peak(
    step: int, steps: int, warmup: int, schedule: Literal["cosine", "constant", "wsd"], decay_fraction: float
) -> None:
    config = OptimiserConfig(lr=3e-4, warmup_steps=warmup, schedule=schedule, decay_fraction=decay_fraction)
    assert 0 < learning_rate(step, steps, config) <= 3e-4


def test_a_norm_far_above_the_median_is_a_spike_until_it_lasts() -> None:
    rule = SpikeRule(3.0)
    for _ in range(15):
        rule.add(1.0)
    assert not rule.is_spike(1e9), "there are too few norms to judge by"
    rule.add(float("nan"))
    rule.add(1.0)
    assert [rule.is_spike(norm) for norm in (None, 2.9, 3.0, 3.1)] == [False, False, False, True]
    skipped = 0
    while rule.is_spike(10.0):
        rule.add(10.0)
        skipped += 1
    assert 10 < skipped <= 32


def test_without_a_factor_nothing_is_a_spike_and_nothing_is_kept() -> None:
    rule = SpikeRule(None)
    for _ in range(20):
        rule.add(1.0)
    assert not rule.is_spike(1e30) and rule.norms == []


def test_vectors_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    model = small_model()
    model.freeze_trunk()
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("bias" in names[id(p)] or "mix_logit" in names[id(p)] for p in plain["params"])
    expected = {name for name, _ in model.extra_parameters()}
    assert {names[id(p)] for group in (decayed, plain) for p in group["params"]} == expected


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = small_model()
    optimiser = make_optimiser(model, OptimiserConfig())
    grouped = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    no_decay = {id(p) for group in optimiser.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {id(p) for name, p in model.named_parameters() if "layernorm" in name or name.endswith("bias")} <= no_decay


def test_a_frozen_module_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing left to train"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.0)


@pytest.mark.parametrize(("world", "micro", "expected"), [(1, None, 1), (2, None, 1), (1, 4, 6), (2, 4, 3), (3, 8, 1)])
def test_a_batch_divides_into_micro_batches(world: int, micro: int | None, expected: int) -> None:
    assert LoopConfig(batch_size=24, micro_batch_size=micro).accumulation(world) == expected


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=24"):
        LoopConfig(batch_size=24, micro_batch_size=5).accumulation(1)


def test_a_vetoed_update_moves_no_average() -> None:
    module = nn.Linear(3, 2)
    optimiser = make_optimiser(module, OptimiserConfig(lr=0.1))
    expected = {p: p.detach().clone() for p in module.parameters()}
    for p, value in expected.items():
        step, zeros = torch.zeros(()), torch.zeros_like(value)
        optimiser.state[p] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone(), EMA: value.clone()}
    for is_allowed, decay in ((True, 0.5), (False, 0.5), (True, 0.9), (True, 0.0)):
        module(torch.ones(1, 3)).sum().backward()
        optimiser.allow_update, optimiser.ema_decay = (lambda _, allowed=is_allowed: allowed), decay
        optimiser.step()
        for p, value in expected.items():
            if is_allowed:
                value.mul_(decay).add_(p.detach(), alpha=1 - decay)
            torch.testing.assert_close(optimiser.state[p][EMA], value)


def test_the_average_forgets_the_starting_weights_soon() -> None:
    assert [ema_decay_after(updates, 0.999) for updates in (0, 90, 10**6)] == [0.1, 0.91, 0.999]
