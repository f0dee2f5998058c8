"""Checks of the pipeline from data to samples; each gives one line: what is sound, or what is broken and what to do.

A model that has memorised a few clips must reproduce them, from its own tokens as well as from the true ones, with the
key/value cache as well as without. If these differ, the fault lies between training and sampling, whatever the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvideo.data.statistics import CaptionLengths, CodeUse
from cogvideo.evaluation.likelihood import token_losses
from cogvideo.evaluation.pixel_metrics import frame_psnr
from cogvideo.inference.engine import Conditioning, Engine, build_program
from cogvideo.inference.sampler import ClusterSampler, TokenSampler
from cogvideo.inference.schedules import SCHEDULES
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sampling.config import SampleConfig
from cogvideo.sequence.batch import Batch

MAX_CUT = 0.01
"""Share of captions that may be truncated; with fewer than 100 captions, none may."""
MAX_SPELLED = 0.1
MIN_GAIN_DB = 3.0
"""By how much an image tokenizer must beat one plain colour per frame, unless it reaches GOOD_DB."""
GOOD_DB = 30.0
MAX_LOSS_SHARE = 0.25
"""A model has learned its clips if its loss is below this share of the loss of uniform guessing."""
MIN_CONSISTENT = 0.98
"""Share of sampled tokens that must also be the most likely in one pass over the sampled clip; ties are rare."""
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest accepted difference between cached and uncached logits, in standard deviations of the logits."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    sound: bool
    text: str
    """What was found; if it is broken, also what to do."""

    def __str__(self) -> str:
        return f"{'ok' if self.sound else 'BROKEN':<7} {self.name}: {self.text}"


def check_captions(lengths: CaptionLengths, text_len: int) -> list[Finding]:
    """Check for captions that are truncated, and for characters missing from the text tokenizer."""
    cut, total = lengths.num_above(text_len), len(lengths.lengths)
    text = f"they take at most {lengths.longest} of {text_len} text tokens"
    if cut:
        text = (
            f"{cut:,} of {total:,} are longer than the model's {text_len} text tokens, up to {lengths.longest}, and are"
        )
        text += f" cut in training and refused in sampling; set model.text_len={lengths.longest}, or shorten them"
    spelled = "it has pieces for the characters of all captions"
    if lengths.num_spelled:
        spelled = f"{lengths.spelled_share:.1%} of the captions have characters that it has no pieces for"
    if lengths.spelled_share > MAX_SPELLED:
        spelled += "; make one from these captions with `cogvideo vocabulary`"
    return [
        Finding("captions", cut <= MAX_CUT * total, text),
        Finding("text tokenizer", lengths.spelled_share <= MAX_SPELLED, spelled),
    ]


def check_round_trip(frames: NDArray[np.uint8], rebuilt: NDArray[np.uint8], use: CodeUse) -> Finding:
    """Compare an image tokenizer's reconstructions of frames (N, H, W, 3) with one plain colour per frame."""
    plain = np.broadcast_to(frames.mean((1, 2), keepdims=True), frames.shape)
    reached, of_plain = (float(frame_psnr(frames, other).mean()) for other in (rebuilt, plain))
    least = min(of_plain + MIN_GAIN_DB, GOOD_DB)
    text = f"frames come back with {reached:.1f} dB (one plain colour: {of_plain:.1f} dB); {use}"
    if reached < least:
        text += "; it does not reproduce such frames: train one on these videos and prepare them again with it"
    elif use.is_low:
        text += ", so that different frames look alike to a model; train it on these videos, or for longer"
    return Finding("image tokenizer", reached >= least and not use.is_low, text)


@dataclass(frozen=True)
class Decoded:
    """How well a model reproduces clips that it should have memorised, on supervised frames."""

    loss: float
    """Mean negative log-likelihood per token, given the true tokens before it, in nats."""
    forced_right: float
    """Share of true tokens that are the most likely, given the true tokens before them."""
    sampled_right: float
    """Share of tokens that are right if all are sampled greedily."""
    consistent: float
    """Share of sampled tokens that are also the most likely in one pass over the sampled clip, however well trained."""
    slot: int | None
    """The first slot, in decoding order, whose cached logits differ from the uncached; None: all agree."""
    difference: float
    """The largest in that slot, or over all slots if none differ; in standard deviations of the logits."""
    place: str
    """Where that difference is, in words."""


@torch.inference_mode()
def decode_again(model: CogVideoTransformer, batch: Batch) -> Decoded:
    """Run clips in one pass, decode them with true tokens, then sample them greedily."""
    layout, codes = model.config.layout, model.config.vocabulary.num_image_tokens
    device = model.word_embeddings.weight.device
    uncached = np.empty((len(batch.frames), layout.num_slots, codes), np.float32)
    losses = token_losses(model, model.plan_clip(device), batch, uncached)
    supervised = list(layout.supervised_frames)
    true = batch.frames.cpu()
    likeliest = torch.from_numpy(uncached.argmax(-1)).view_as(true)

    order = SCHEDULES["sequential"](
        layout, layout.given_frames, layout.generation_order, model.config.window_size
    ).order
    recorder = _Recorder(torch.full(uncached.shape, torch.nan))
    _generate(model, batch, recorder, "sequential")
    differences = (recorder.logits.numpy() - uncached)[:, order]
    spread = float(np.std(uncached[:, order])) or 1.0
    by_slot = np.nan_to_num(np.abs(differences), nan=np.inf).max((0, 2)) / spread
    above = np.flatnonzero(by_slot > TOLERANCE[model.word_embeddings.weight.dtype])
    worst = int(above[0]) if len(above) else int(by_slot.argmax())

    greedy = ClusterSampler(np.arange(codes), 1.0, 1, 1.0)
    drawn = _generate(model, batch, greedy.to(device), SampleConfig.schedule).view_as(true)
    again = np.empty_like(uncached)
    token_losses(model, model.plan_clip(device), Batch(batch.text, batch.text_mask, drawn, batch.seconds), again)
    return Decoded(
        loss=float(losses[:, supervised].mean()),
        forced_right=_share_right(likeliest, true, supervised),
        sampled_right=_share_right(drawn, true, supervised),
        consistent=_share_right(torch.from_numpy(again.argmax(-1)).view_as(true), drawn, supervised),
        slot=int(order[worst]) if len(above) else None,
        difference=float(by_slot[worst]),
        place=describe_slot(int(order[worst]), model.config.frame_side),
    )


def describe_slot(slot: int, frame_side: int) -> str:
    frame, raster = divmod(slot, frame_side**2)
    return f"frame {frame}, row {raster // frame_side}, column {raster % frame_side}"


def _share_right(tokens: Tensor, true: Tensor, frames: Sequence[int]) -> float:
    return float((tokens == true)[:, list(frames)].double().mean())


class _Recorder:
    """A sampler that records each slot's logits and returns its true token; `uniforms` carries tokens and slots."""

    def __init__(self, logits: Tensor) -> None:
        """`logits` (clips, slots, image tokens) is filled."""
        self.logits = logits

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        self.logits[:, uniforms[0, :, 1].long().cpu()] = logits.float().cpu()
        return uniforms[..., 0].long()


def _generate(model: CogVideoTransformer, batch: Batch, sampler: TokenSampler, schedule: str) -> Tensor:
    """Generate the supervised frames, given the others, without guidance: all tokens (clips, slots)."""
    layout = model.config.layout
    plan = SCHEDULES[schedule](layout, layout.given_frames, layout.generation_order, model.config.window_size)
    program = build_program(model.config, plan, temporal=model.config.has_temporal_channel, joined=model.is_joined)
    texts = [row[mask].tolist() for row, mask in zip(batch.text, batch.text_mask, strict=True)]
    pad = model.config.vocabulary.pad
    conditioning = Conditioning.from_tokens(texts, [], pad, guidance_scale=None, text_bonus=0.0)
    known = batch.frames.flatten(1)
    slots = torch.arange(known.shape[1]).expand_as(known)
    uniforms = torch.stack([known, slots], -1).double()
    if not isinstance(sampler, _Recorder):
        uniforms.fill_(0.5)
        known = known.clone().view_as(batch.frames)
        known[:, list(layout.supervised_frames)] = 0
        known = known.flatten(1)
    engine = Engine(model)
    return engine.generate(program.to(engine.device), known, conditioning, sampler, uniforms)


def check_training(decoded: Decoded, first_loss: float, steps: int, num_codes: int) -> Finding:
    """Check that a small model has memorised its clips."""
    limit = MAX_LOSS_SHARE * math.log(num_codes)
    text = f"the loss of a small model fell from {first_loss:.2f} to {decoded.loss:.3f} in {steps} steps"
    if not decoded.loss < limit:
        text += f", not below {limit:.2f}: it has not learned its clips; give more --steps, or look for what training "
        text += "reads: identical clips with different captions, tokens of another image tokenizer, a faulty device"
    return Finding("training", decoded.loss < limit, text)


def check_cache(decoded: Decoded, name: str = "cache") -> Finding:
    """Check that decoding with the cache gives the same logits as one pass over the clip."""
    if decoded.slot is None:
        return Finding(
            name, True, f"cached logits agree with uncached (to {decoded.difference:.1e} standard deviations)"
        )
    return Finding(
        name,
        False,
        f"cached logits differ from uncached at slot {decoded.slot} ({decoded.place}) by {decoded.difference:.2g} "
        "standard deviations; the fault is in decoding (masks, positions, kernels), not in the training: run "
        "tests/unit/inference and tests/unit/kernels here",
    )


def check_samples(decoded: Decoded) -> Finding:
    """Check that the tokens sampled are those that the model finds most likely."""
    text = (
        f"{decoded.sampled_right:.1%} of the tokens are right if sampled, {decoded.forced_right:.1%} with true tokens "
    )
    text += "before each"
    if decoded.consistent >= MIN_CONSISTENT:
        return Finding("samples", True, text)
    text += f", and {decoded.consistent:.1%} of those sampled are the likeliest in one pass over them"
    text += "; loss falls but samples are noise"
    if decoded.slot is not None:
        text += f", because cached logits differ from uncached at slot {decoded.slot}"
    else:
        text += ": logits agree with true tokens, so look at the schedule and at how tokens are drawn"
    return Finding("samples", False, text)


def summary(findings: Sequence[Finding]) -> str:
    """All findings in one line."""
    broken = [finding.name for finding in findings if not finding.sound]
    return f"broken: {', '.join(broken)}" if broken else "sound: data, tokenizers, training and sampling fit together"
