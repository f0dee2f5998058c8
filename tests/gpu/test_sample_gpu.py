"""Sampling on a GPU with the bundled weights, against the CPU."""

from dataclasses import replace

import pytest

from cogvideo.sampling.pipeline import Pipeline

pytestmark = pytest.mark.gpu

PROMPTS = ["the red digit 3 moves left slowly", "绿色的数字5向上快速移动"]


@pytest.mark.parametrize("schedule", ["sequential", "wavefront", "speculative"])
def test_float32_draws_what_the_cpu_draws(schedule: str) -> None:
    """Another device rounds otherwise, which may turn a token and those after it; most clips keep all of theirs."""
    config = replace(Pipeline.load(device="cpu").config, schedule=schedule, samples_per_prompt=4, rounds=1)
    here, there = (Pipeline.load(device=device).sample(PROMPTS, config) for device in ("cpu", "cuda"))
    assert (here == there).flatten(1).all(1).float().mean() >= 0.5


@pytest.mark.parametrize("weights", ["bf16", "fp16", "int8", "int4"])
def test_narrow_weights_draw_nearly_what_float32_draws(weights: str) -> None:
    pipeline = Pipeline.load(weights=weights, device="cuda")  # type: ignore[arg-type]
    config = replace(pipeline.config, samples_per_prompt=4, rounds=0)
    exact = Pipeline.load(device="cpu").sample(PROMPTS, config)
    assert (pipeline.sample(PROMPTS, config) == exact).float().mean() >= 0.5
