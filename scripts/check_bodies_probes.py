"""Score real clips of the bodies world with its probes: how far a probe can be trusted. One JSON line per clip length.

    cogvideo worlds bodies --out DIR --count 200 --split test --pixels 64
    python scripts/check_bodies_probes.py DIR [--blur 0.7] [--crf 30] [--tokenizer TOKENIZER]

--blur and --crf soften or compress the pictures first; --tokenizer encodes and decodes them with an image tokenizer.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from scipy.ndimage import gaussian_filter

from cogvideo.cli.main import run_command
from cogvideo.logs import progress
from cogvideo.media.video import read_video, write_video
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.worlds.bodies.files import read_truth
from cogvideo.worlds.bodies.measure import Facts
from cogvideo.worlds.bodies.probes import ClipScore, score_clip, summarise
from cogvideo.worlds.bodies.scene import FPS

KEY_FRAMES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that `cogvideo worlds bodies` wrote")
    parser.add_argument("--count", type=int, default=200, help="number of clips (default: 200)")
    parser.add_argument("--blur", type=float, default=0.0, help="standard deviation in pixels")
    parser.add_argument("--crf", type=int, help="encode again as H.264 with this quality, 0 (best) to 51")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="encode and decode with this image tokenizer")
    args = parser.parse_args()
    tokenizer = ImageTokenizer.load(args.tokenizer) if args.tokenizer else None

    scores: dict[str, list[ClipScore]] = {}
    paths = sorted((args.folder / "truth").glob("*.npz"))[: args.count]
    with progress(len(paths), "scoring", "clips") as bar:
        for path in paths:
            truth = read_truth(path)
            frames, times = read_video(args.folder / "clips" / f"{path.stem}.mp4")
            frames = degrade(frames, args.blur, args.crf)
            if tokenizer is not None:
                frames = reconstruct(frames, tokenizer)
            facts = Facts.from_scene(truth.scene)
            scores.setdefault("all frames", []).append(score_clip(frames, facts, times))
            for caption in truth.captions:
                first, last = round(caption.start * FPS), round((caption.start + caption.clip_seconds) * FPS)
                picked = np.linspace(first, last, KEY_FRAMES).round().astype(int)
                name = f"{KEY_FRAMES} frames of {caption.clip_seconds:g} s"
                scores.setdefault(name, []).append(score_clip(frames[picked], facts, times[picked]))
            bar.update(1)
    for name, values in scores.items():
        print(json.dumps({"set": name, "clips": len(values), **summarise(values).to_json()}))


def degrade(frames: np.ndarray, blur: float, crf: int | None) -> np.ndarray:
    """Blur and compress a clip (frames, H, W, 3) uint8."""
    if blur:
        frames = np.rint(gaussian_filter(frames.astype(np.float32), (0, blur, blur, 0))).astype(np.uint8)
    if crf is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_video(Path(folder) / "clip.mp4", frames, FPS, pixel_format="yuv444p", crf=crf)
            frames, _ = read_video(Path(folder) / "clip.mp4")
    return frames


def reconstruct(frames: np.ndarray, tokenizer: ImageTokenizer) -> np.ndarray:
    """A clip (frames, H, W, 3) uint8 as its image tokens show it."""
    pixels = rearrange(torch.from_numpy(frames), "n h w c -> n c h w").float() / 255
    decoded = tokenizer.decode(tokenizer.encode(pixels))
    return (rearrange(decoded, "n c h w -> n h w c") * 255).round().to(torch.uint8).numpy()


if __name__ == "__main__":
    sys.exit(run_command(main, "check_bodies_probes"))
