"""Guessing changes the number of forwards and never a token."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.inference.batching import Together
from cogvideo.inference.engine import Conditioning, compile_program, generate
from cogvideo.inference.sampler import ClusterDraw
from cogvideo.inference.schedules import Schedule, sequential
from cogvideo.inference.speculative import speculative
from cogvideo.model.config import Task
from cogvideo.model.quantize import convert_weights
from cogvideo.model.transformer import CogVideoTransformer
from tests.helpers import decoding as tiny

DRAW = ClusterDraw(np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)


def decoded(model: CogVideoTransformer, schedule: Schedule, scale: float | None, known: Tensor) -> tuple[Tensor, int]:
    """Tokens of three clips, and the forwards that they took after prefill."""
    together = Together(model)
    texts, guides = [tiny.encode(text) for text in ("left", "quickly right", "up")], [tiny.encode("any")] * 3
    conditioning = Conditioning.of(
        texts, guides if scale else [], tiny.VOCABULARY.pad, guidance_scale=scale, text_bonus=0.0 if scale else 1.4
    )
    uniforms = torch.from_numpy(np.random.default_rng(3).random((*known.shape, 2)))
    drawn: list[int] = []
    temporal = bool(len(schedule.given))
    program = compile_program(model.config, schedule, temporal=temporal)
    tokens = generate(model, program, known, conditioning, DRAW, uniforms, drawn.append, together)
    assert sum(drawn) == 3 * program.tokens_drawn
    return tokens, together.forwards


@pytest.mark.parametrize(("task", "window_size"), [("sequential", None), ("sequential", 2), ("interpolation", 2)])
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("window", [1, 3, 16])
def test_tokens_are_those_of_sequential_decoding(
    task: Task, window_size: int | None, scale: float | None, window: int
) -> None:
    model = tiny.model(task, window_size)
    layout = model.config.layout
    plain = sequential(layout, layout.given_frames, layout.generation_order)
    known = torch.from_numpy(np.random.default_rng(4).integers(tiny.NUM_CODES, size=(3, layout.num_slots)))
    expected, _ = decoded(model, plain, scale, known)
    tokens, _ = decoded(model, speculative(plain, layout, window), scale, known)
    assert torch.equal(tokens, expected)
    assert len(expected.unique()) > 10, "the test means nothing if all tokens are alike"


def test_a_first_frame_too() -> None:
    model = tiny.model("sequential")
    plain = sequential(model.config.layout, (), (0,))
    known = torch.zeros(3, 16, dtype=torch.int64)
    assert torch.equal(
        decoded(model, plain, None, known)[0], decoded(model, speculative(plain, model.config.layout), None, known)[0]
    )


def test_right_guesses_save_forwards() -> None:
    """A model whose tokens depend on nothing but their own uniforms is known after a window's second forward."""
    model = tiny.model("interpolation", 2)
    with torch.no_grad():
        model.final_layernorm.weight.zero_()
    layout = model.config.layout
    plain = sequential(layout, layout.given_frames, layout.generation_order)
    known = torch.zeros(3, layout.num_slots, dtype=torch.int64)
    tokens, forwards = decoded(model, speculative(plain, layout, 8), None, known)
    expected, steps = decoded(model, plain, None, known)
    assert torch.equal(tokens, expected)
    assert steps == 32
    assert forwards <= 8


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_narrow_weights_too(dtype: str) -> None:
    model = tiny.model("sequential")
    convert_weights(model, dtype)  # type: ignore[arg-type]
    layout = model.config.layout
    plain = sequential(layout, layout.given_frames, layout.generation_order)
    known = torch.from_numpy(np.random.default_rng(4).integers(tiny.NUM_CODES, size=(3, layout.num_slots)))
    assert torch.equal(decoded(model, plain, 3.0, known)[0], decoded(model, speculative(plain, layout), 3.0, known)[0])
