"""Sampling on a GPU with the bundled weights, against the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo.model.inputs import TextBias
from cogvideo.model.quantize import Linear
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sequence.batch import frame_inputs
from tests.helpers.models import tiny_batch

pytestmark = pytest.mark.gpu

PROMPTS = ["the red digit 3 moves left slowly", "绿色的数字5向上快速移动"]


NARROW = {"bf16": 0.05, "fp16": 0.006, "int8": 0.08, "int4": 0.9}
"""Twice the mean error of a log-probability in this arithmetic on a CPU."""


def on(device: str, **loading: Any) -> Pipeline:
    return Pipeline.load(config=SampleConfig(device=device, **loading))


@pytest.mark.parametrize("schedule", ["sequential", "wavefront", "speculative"])
def test_float32_draws_what_the_cpu_draws(schedule: str) -> None:
    """Another device rounds otherwise, which may turn a token and those after it; most clips keep all of theirs."""
    config = replace(on("cpu").config, schedule=schedule, samples_per_prompt=4, rounds=1)
    here, there = (on(device, weights="fp32").sample(PROMPTS, config) for device in ("cpu", "cuda"))
    assert (here == there).flatten(1).all(1).float().mean() >= 0.5


@pytest.mark.parametrize("schedule", ["sequential", "wavefront", "speculative"])
def test_compiled_and_replayed_steps_draw_what_others_draw(schedule: str) -> None:
    plain, compiled = on("cuda", weights="fp32"), on("cuda", weights="fp32", compile=True)
    config = replace(plain.config, schedule=schedule, samples_per_prompt=4, rounds=1)
    assert (compiled.sample(PROMPTS, config) == plain.sample(PROMPTS, config)).flatten(1).all(1).float().mean() >= 0.5
    for other in (replace(config, seed=1), config):  # caches come and go, and what was recorded on them
        assert (compiled.sample(PROMPTS[:1], other) == plain.sample(PROMPTS[:1], other)).float().mean() >= 0.5


@torch.no_grad()
def log_probabilities(device: str, weights: Any) -> Tensor:
    """Of all image tokens at every supervised slot of the same random clips."""
    model = on(device, weights=weights).sequential
    batch = tiny_batch(model.config, 4).to(torch.device(device))
    inputs = frame_inputs(batch.frames, model.config.vocabulary.start_of_image)
    plan = model.plan_clip(inputs.device, supervised_only=True)
    hidden = model(inputs, plan, TextBias.from_mask(batch.text_mask), text=batch.text)
    return model.logits(hidden).log_softmax(-1).cpu()


@pytest.mark.parametrize(("weights", "error"), NARROW.items())
def test_narrow_weights_give_nearly_the_logits_of_float32(weights: str, error: float) -> None:
    """Under the same inputs: drawn tokens would differ from the first one that rounding turns."""
    exact = log_probabilities("cpu", "fp32")
    assert (log_probabilities("cuda", weights) - exact).abs().mean() < error


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_streamed_layers_draw_what_held_ones_draw_and_take_no_memory(weights: str) -> None:
    before = torch.cuda.memory_allocated()
    held = on("cuda", weights=weights)
    between = torch.cuda.memory_allocated()
    streamed = on("cuda", weights=weights, stream_layers=True)
    saved = (between - before) - (torch.cuda.memory_allocated() - between)
    config = replace(held.config, rounds=0)
    assert torch.equal(held.sample(PROMPTS, config), streamed.sample(PROMPTS, config))
    matrices = [module.weight for module in streamed.sequential.modules() if isinstance(module, Linear)]
    assert all(matrix.device.type == "cpu" for matrix in matrices)
    assert saved >= sum(matrix.nbytes for matrix in matrices)
