"""A round of interpolation: which frames go where."""

import pytest
import torch

from cogvideo.inference.clip_sampler import ClipSampler
from cogvideo.inference.engine import compile_program
from cogvideo.inference.schedules import sequential
from cogvideo.rng import sample_keys
from cogvideo.sampling.config import DrawConfig
from cogvideo.sampling.interpolate import clip_seconds, sample_between
from tests.helpers import decoding as tiny

MODEL = tiny.model("interpolation", 2)
LAYOUT = MODEL.config.layout


class Echo:
    """Draws, for each new token, the number of its slot's uniform, counted over all clips."""

    def __init__(self) -> None:
        self.uniforms: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        self.uniforms.append(uniforms)
        return torch.full(logits.shape[:-1], 47)


def sampler(draw: Echo) -> ClipSampler:
    program = compile_program(MODEL.config, sequential(LAYOUT, LAYOUT.given_frames, LAYOUT.generation_order))
    return ClipSampler(MODEL, program, draw, DrawConfig(text_bonus=0.0), clips_at_once=3)


def test_old_frames_stay_and_new_ones_lie_between() -> None:
    frames = torch.randint(40, (2, 9, 16), generator=torch.Generator().manual_seed(0))
    texts = [tiny.encode("a"), tiny.encode("b")]
    echo = Echo()
    out = sample_between(sampler(echo), frames, texts, None, sample_keys(0, ["a", "b"]), 2)
    assert out.shape == (2, 17, 16)
    assert torch.equal(out[:, ::2], frames)
    assert (out[:, 1::2] == 47).all()
    numbers = torch.cat([u[..., 0].flatten() for u in echo.uniforms])
    assert len(numbers) == 2 * 8 * 16 == len(numbers.unique()), "every slot has numbers of its own"


@pytest.mark.parametrize("count", [2, 4])
def test_a_last_clip_short_of_frames_repeats_the_last_one(count: int) -> None:
    """Any number of frames can be interpolated; what is drawn behind the last of them is not kept."""
    frames = torch.randint(40, (1, count, 16), generator=torch.Generator().manual_seed(0))
    out = sample_between(sampler(Echo()), frames, [[51]], None, sample_keys(0, ["a"]), 1)
    assert out.shape == (1, 2 * count - 1, 16) and torch.equal(out[:, ::2], frames) and (out[:, 1::2] == 47).all()
    longer = torch.cat([frames, frames[:, -1:]], dim=1)
    assert torch.equal(out, sample_between(sampler(Echo()), longer, [[51]], None, sample_keys(0, ["a"]), 1)[:, :-2])


def test_nothing_lies_between_one_frame() -> None:
    with pytest.raises(ValueError, match="nothing between 1 frame"):
        sample_between(sampler(Echo()), torch.zeros(1, 1, 16).long(), [[51]], None, sample_keys(0, ["a"]), 1)


def test_seconds_of_triplets() -> None:
    assert [clip_seconds(LAYOUT, frames, 4.0) for frames in (5, 9, 17)] == [2.0, 1.0, 0.5]
