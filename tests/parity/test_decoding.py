"""Prefill and cached decoding against the published code, along the tokens that it chose."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cogvideo.inference.engine import Conditioning, Engine, apply_guidance, build_program
from cogvideo.inference.schedules import sequential
from cogvideo.model.inputs import TextBias
from cogvideo.model.plan import plan_forward
from cogvideo.sequence.batch import frame_inputs
from tests.helpers.packs import Pack, open_pack, published_model

FRAME_LEN = 400


@dataclass(frozen=True)
class Case:
    pack: str
    stage: int
    given: tuple[int, ...]
    frames: tuple[int, ...]
    temporal: bool = True

    @property
    def order(self) -> tuple[int, ...]:
        """Frames of the pack's sequence."""
        return (*self.given, *self.frames)


CASES = [
    Case("decode_d1_first_frame", 1, (), (0,), temporal=False),
    Case("decode_d2c_stage1_noguide_w0", 1, (0,), (1, 2, 3, 4)),
    Case("decode_d3_stage1_guided_a3", 1, (0,), (1, 2, 3, 4)),
    Case("decode_d4b_stage2_noguide_w0", 2, (0, 2, 4), (1, 3)),
]


@dataclass
class FollowPack:
    """A sampler that takes the tokens of the pack, and records the logits it was given."""

    tokens: Tensor
    """(clips, steps)."""
    logits: list[Tensor] = field(default_factory=list)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        assert logits.shape[:2] == uniforms.shape[:2] == (len(self.tokens), 1)
        self.logits.append(logits[:, 0])
        return self.tokens[:, len(self.logits) - 1, None]


def conditioning_of(pack: Pack) -> Conditioning:
    texts = pack["tokens"][:, : pack.about["text_len"]].tolist()
    guides = pack["guide_text"].tolist() if "guide_text" in pack.tensors else []
    return Conditioning.from_tokens(
        texts,
        guides,
        pack.about["special"]["<pad>"],
        guidance_scale=pack.about["guidance_alpha"] if guides else None,
        text_bonus=float(pack.about["log_text_attention_weights"]),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.pack)
def test_logits_along_the_published_tokens(case: Case) -> None:
    pack = open_pack(case.pack)
    model = published_model(case.stage, 10 if case.stage == 2 else None)
    conditioning = conditioning_of(pack)
    sequence = pack["tokens"][:, pack.about["text_len"] + 1 :].unflatten(1, (-1, FRAME_LEN))
    clip = torch.zeros(len(sequence), max(case.order) + 1, FRAME_LEN, dtype=torch.int64)
    clip[:, list(case.order)] = sequence

    known = torch.full_like(clip, -1)
    known[:, list(case.given)] = clip[:, list(case.given)]
    sampler = FollowPack(clip[:, list(case.frames)].flatten(1))
    program = build_program(
        model.config,
        sequential(model.config.layout, case.given, case.frames),
        temporal=case.temporal,
        given_windows="wrapped",
    )
    uniforms = torch.zeros(*known.flatten(1).shape, 2, dtype=torch.float64)
    out = Engine(model).generate(program, known.flatten(1), conditioning, sampler, uniforms)
    assert torch.equal(out, clip.flatten(1))

    cached = torch.stack(sampler.logits)
    first = pack.about["text_len"] + 1 + len(case.given) * FRAME_LEN
    torch.testing.assert_close(cached[pack["index"] - first], pack["logits"], atol=1e-4, rtol=0)

    if conditioning.text_bonus == 0:  # else given frames have a bonus of their own, which one pass cannot have
        torch.testing.assert_close(cached, uncached_logits(case, pack, clip), atol=1e-4, rtol=0)


@torch.inference_mode()
def uncached_logits(case: Case, pack: Pack, clip: Tensor) -> Tensor:
    """The same logits by one forward over the whole clip: (steps, clips, image tokens)."""
    model = published_model(case.stage, 10 if case.stage == 2 else None)
    conditioning = conditioning_of(pack)
    plan = plan_forward(model.config, temporal=case.temporal, given_windows="wrapped")
    inputs = frame_inputs(clip, model.config.vocabulary.start_of_image)
    if conditioning.guidance_scale is not None:
        inputs = inputs.repeat(2, 1)
    hidden = model(inputs, plan, TextBias.from_mask(conditioning.text_mask), text=conditioning.text)
    logits = apply_guidance(model.logits(hidden), conditioning.guidance_scale)
    return logits[:, model.config.layout.slots_of(*case.frames)].transpose(0, 1)
