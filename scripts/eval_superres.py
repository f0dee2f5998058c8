"""Compare super-resolution of moving digits with plain enlargement and with the upper bound set by the tokenizer.

    python scripts/eval_superres.py [--model DIR] [--clips 64] [--frames 5] [--json FILE] [key=value ...]

The clips show test digits, which are in no training clip: their first frames, at 8 per second, rendered at 40 and at
120 pixels. The small frames are encoded and upsampled; every result is compared with the large ones. `key=value` are
settings of `cogvideo upsample`.

Flicker is the mean absolute change, out of 255, between consecutive frames at the pixels that do not change in the true
clip: the background. Digit and colour are judged by the probes of `cogvideo eval digits`, at 40 pixels.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from numpy.typing import NDArray

from cogvideo.cli.main import run_command
from cogvideo.data.encode import TokenEncoder
from cogvideo.evaluation.pixel_metrics import frame_psnr, ssim
from cogvideo.files import BUNDLED_WEIGHTS, write_json
from cogvideo.sampling.bundle import load_upsample_config
from cogvideo.sampling.superres import Upsampler
from cogvideo.worlds.digits.files import draw_clips
from cogvideo.worlds.digits.probes import probe_clips, summarise
from cogvideo.worlds.digits.render import CANVAS, FPS, DigitClip, render

PIXELS = 120
SEED = 21
Clips = NDArray[np.uint8]
"""(clips, frames, side, side, 3)"""


@dataclass(frozen=True)
class Scores:
    """Scores of one way to get large frames, over all clips."""

    psnr: float
    """Mean over frames, dB."""
    ssim: float
    digit: float
    """Share of clips in which the probe recognises the right digit."""
    colour: float
    flicker: float
    """Out of 255."""


def score(frames: Clips, truth: Clips, clips: Sequence[DigitClip]) -> Scores:
    small = reduce(frames.astype(np.float32), "n t (h a) (w b) c -> n t h w c", "mean", h=CANVAS, w=CANVAS)
    probes = summarise(probe_clips(small.round().astype(np.uint8), clips, np.arange(frames.shape[1]) / FPS))
    return Scores(
        psnr=float(np.mean([frame_psnr(a, b) for a, b in zip(frames, truth, strict=True)])),
        ssim=float(np.mean([ssim(a, b) for a, b in zip(frames, truth, strict=True)])),
        digit=probes.digit.value,
        colour=probes.colour.value,
        flicker=still_flicker(frames, truth),
    )


def still_flicker(frames: Clips, truth: Clips) -> float:
    """Mean absolute change between consecutive frames where those of `truth` are equal; NaN if they never are."""
    is_still = (np.diff(truth.astype(np.int16), axis=1) == 0).all(axis=-1)
    change = np.abs(np.diff(frames.astype(np.int16), axis=1)).mean(axis=-1)
    return float(change[is_still].mean()) if is_still.any() else float("nan")


def enlarge(frames: Clips, mode: str) -> Clips:
    """Resize frames to PIXELS; `mode` is `nearest` or `bicubic`."""
    pixels = rearrange(torch.from_numpy(frames).float(), "n t h w c -> (n t) c h w")
    large = F.interpolate(pixels, (PIXELS, PIXELS), mode=mode).round().clamp(0, 255).byte()
    enlarged: Clips = rearrange(large, "(n t) c h w -> n t h w c", n=len(frames)).numpy()
    return enlarged


def reconstruct(frames: Clips, encoder: TokenEncoder) -> Clips:
    return np.stack([encoder.reconstruct(clip) for clip in frames])


def upsample(upsampler: Upsampler, frames: Clips, captions: Sequence[str]) -> Clips:
    encoder = TokenEncoder(upsampler.image_tokenizer)
    tokens = np.stack([encoder(clip) for clip in frames]).astype(np.int64)
    return upsampler.decode(upsampler.upsample(torch.from_numpy(tokens), captions))


def ways(
    upsampler: Upsampler, small: Clips, truth: Clips, captions: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Clips]]]:
    """Each way to get large frames, by name."""
    rebuilt = reconstruct(small, TokenEncoder(upsampler.image_tokenizer))
    for name, source in {"real 40 pixels": small, "40 pixels after the tokenizer": rebuilt}.items():
        for mode in ("nearest", "bicubic"):
            yield f"{name}, {mode}", lambda source=source, mode=mode: enlarge(source, mode)
    for noise in ("independent", "shared"):
        drawing = replace(upsampler, config=replace(upsampler.config, noise=noise))
        direct = replace(drawing, iterative=None)
        yield f"direct, {noise} noise", lambda direct=direct: upsample(direct, small, captions)
        if upsampler.iterative is not None:
            yield f"direct and iterative, {noise} noise", lambda both=drawing: upsample(both, small, captions)
    yield "120 pixels after the tokenizer", lambda: reconstruct(truth, TokenEncoder(upsampler.high_res_tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of `cogvideo upsample`")
    parser.add_argument("--model", type=Path, default=BUNDLED_WEIGHTS, metavar="DIR", help="default: the bundled one")
    parser.add_argument("--clips", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--frames", type=int, default=5, metavar="N", help="of each clip (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    if args.clips < 1 or args.frames < 2:
        parser.error("--clips must be at least 1, and --frames at least 2")
    config = load_upsample_config(args.model, [], args.settings)
    upsampler = Upsampler.load(args.model, config)
    drawn = list(draw_clips("test", args.clips, SEED))
    clips, captions = [clip for clip, _ in drawn], [clip.caption(language) for clip, language in drawn]
    times = np.arange(args.frames) / FPS
    small, truth = (np.stack([render(clip, times, side) for clip in clips]) for side in (CANVAS, PIXELS))

    results = {}
    print("| frames of 120 pixels | PSNR, dB | SSIM | digit | colour | flicker |\n|---|---|---|---|---|---|")
    for name, make in (*ways(upsampler, small, truth, captions), ("the true frames", lambda: truth)):
        of = results[name] = score(make(), truth, clips)
        row = f"| {name} | {of.psnr:.1f} | {of.ssim:.3f} | {of.digit:.1%} | {of.colour:.1%} | {of.flicker:.2f} |"
        print(row, flush=True)
    if args.json is not None:
        write_json(args.json, {name: vars(scores) for name, scores in results.items()})


if __name__ == "__main__":
    sys.exit(run_command(main, "eval_superres"))
