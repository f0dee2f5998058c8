"""The full recipe of the bodies world, from scratch: videos, tokenizers, trunk, both stages, super-resolution, bundle.

    python scripts/pretrain_bodies.py [--out DIR] [--device cpu|cuda] [--threads N] [--clips N] [--minutes N]
                                      [--only STEP ...]

Every step is one `cogvideo` command, printed before it runs. The script may be stopped at any time, even with SIGKILL;
the same command continues it: finished steps are skipped (each leaves a file in DIR/done), rendering and preparing
continue with what is missing, and training resumes from its last checkpoint, at most ten minutes old. The bundle is
DIR/bundle.

docs/guides/bodies.md lists the steps and the hours planned for each.

--minutes N trains for N minutes in all, less what the other unfinished steps take: each training run measures its speed
in its first steps, and its schedule is set to fill its share of what is left. Render and prepare beforehand, as on a
GPU machine these steps take longest: give their names to --only, then copy DIR.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from cogvideo.cli.main import run_command
from cogvideo.config import load_config
from cogvideo.recipes.steps import QUIET, Step, check_trained, choose_steps, run, schedule_for
from cogvideo.training.config import TrainConfig
from cogvideo.training.resources import has_native_matmul

ROOT = Path(__file__).resolve().parents[1]
LARGE_CLIPS = 4000
"""Clips rendered at 192 pixels as well as 64; as many as the image tokenizer and super-resolution need."""
TEST_CLIPS = 200
TRAINING_HOURS = {
    "tokenizer": 3.6,
    "trunk": 1.1,
    "sequential": 10.0,
    "interpolation": 2.8,
    "superres_direct": 1.9,
    "superres_iterative": 1.6,
}
"""The training steps, and their hours on one core (AMD Zen 3, float32), in proportion to which they share --minutes."""
BATCH_FACTOR = {"cpu": 1, "cuda": 4}
"""Factor on the configs' batch sizes: a GPU takes larger batches in the same time, as small ones leave it waiting."""


def recipe(out: Path, device: str, threads: int, clips: int) -> list[Step]:
    """All steps, in order; everything is written under `out`."""
    done = out / "done"
    tokenizer, text = out / "tokenizer/export/image_tokenizer", out / "text.model"

    def step(name: str, *words: str | Path) -> Step:
        return Step(name, done / name, [str(word) for word in words])

    def videos(name: str, count: int, split: str, *words: str) -> Step:
        what = ("--out", out / name, "--count", str(count), "--split", split)
        return step(name, "worlds", "bodies", *what, *words, "--processes", str(threads))

    def prepare(name: str, captions: str, *words: str | Path) -> Step:
        workers = f"workers={min(threads, 8)}"
        return step(name, "prepare", "--captions", out / captions, "--out", out / name, workers, *words)

    def train(name: str, config: str, data: list[str], validation: str, init: Path | None = None) -> Step:
        file = f"configs/train/bodies_{config}.yaml"
        batch_size = load_config(TrainConfig, [ROOT / file], []).train.batch_size * BATCH_FACTOR[device]
        words = [
            *("train", "--config", file, "--resume"),
            f"run_dir={out / name}",
            f"data.path=[{','.join(str(out / folder) for folder in data)}]",
            f"data.validation={out / validation}",
            f"train.batch_size={batch_size}",
        ]
        if name != "tokenizer":
            words += [f"data.text_tokenizer={text}", f"data.image_tokenizer={tokenizer}"]
            words += ["train.dtype=bf16"] if has_native_matmul(torch.device(device), torch.bfloat16) else []
        return step(name, *words, *([f"init.checkpoint={init}"] if init else []))

    trunk = out / "trunk/export/trunk"
    sequential = out / "sequential/export/sequential"
    tokens = ("--tokenizer", tokenizer, "--device", device)
    frames = ("--frames", "frame_pixels=64")
    pairs, cut = ("--config", "configs/data/bodies_pairs.yaml"), ("--config", "configs/data/bodies.yaml")
    crops = ("--frames", "frame_pixels=192", "crop_pixels=64", "frames_per_video=2")
    more: list[Step] = []
    clip_folders = ["clips"]
    if clips > LARGE_CLIPS:
        more = [
            videos("more_videos", clips - LARGE_CLIPS, "train", "--pixels", "64", "--seed", "1"),
            prepare("more_clips", "more_videos/captions.jsonl", *tokens, *cut),
        ]
        clip_folders.append("more_clips")
    return [
        videos("videos", min(LARGE_CLIPS, clips), "train"),
        videos("validation_videos", min(TEST_CLIPS, clips), "test"),
        prepare("frames", "videos/captions.jsonl", *frames, "frames_per_video=3"),
        prepare("crops", "videos/captions_192.jsonl", *crops),
        prepare("validation_frames", "validation_videos/captions.jsonl", *frames, "frames_per_video=2"),
        train("tokenizer", "tokenizer", ["frames", "crops"], "validation_frames"),
        prepare("pairs", "videos/captions_192.jsonl", *tokens, *pairs),
        prepare("validation_pairs", "validation_videos/captions_192.jsonl", *tokens, *pairs),
        prepare("clips", "videos/captions.jsonl", *tokens, *cut),
        *more,
        prepare("validation_clips", "validation_videos/captions.jsonl", *tokens, *cut),
        step(
            *("vocabulary", "vocabulary", "--overwrite", "--captions", out / "videos/captions.jsonl"),
            *("--tokenizer", tokenizer, "--out", text),
        ),
        train("trunk", "image", clip_folders, "validation_clips"),
        train("sequential", "sequential", clip_folders, "validation_clips", trunk),
        train("interpolation", "interpolation", clip_folders, "validation_clips", sequential),
        train("superres_direct", "superres_direct", ["pairs"], "validation_pairs", trunk),
        train("superres_iterative", "superres_iterative", ["pairs"], "validation_pairs", trunk),
        step(
            *("bundle", "bundle", "--overwrite", "--text", text, "--tokenizer", tokenizer, "--trunk", trunk),
            *("--sequential", sequential, "--interpolation", out / "interpolation/export/interpolation"),
            *("--direct", out / "superres_direct/export/direct_superres"),
            *("--iterative", out / "superres_iterative/export/iterative_superres"),
            *("--sampling", "configs/sample/bodies.yaml", "--examples", "configs/sample/bodies_examples.txt"),
            *("--clusters", "64", "--out", out / "bundle"),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bodies"), metavar="DIR", help="default: runs/bodies")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument("--clips", type=int, default=12000, metavar="N", help="training clips (default: 12,000)")
    parser.add_argument("--minutes", type=float, metavar="N", help="fit the training into this time")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps, even if finished")
    args = parser.parse_args()
    if args.threads < 1 or args.clips < 1 or (args.minutes is not None and args.minutes <= 0):
        parser.error("--threads, --clips and --minutes must be above 0")
    out = args.out.resolve()  # before the working directory changes
    os.chdir(ROOT)

    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    environment = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    steps = choose_steps(recipe(out, args.device, args.threads, args.clips), args.only)
    for index, step in enumerate(steps):
        if deadline is not None and step.name in TRAINING_HOURS:
            to_train = [TRAINING_HOURS[later.name] for later in steps[index:] if later.name in TRAINING_HOURS]
            seconds = (deadline - time.monotonic()) * to_train[0] / sum(to_train)
            schedule = schedule_for(step, out / step.name, seconds, args.threads, environment)
            settings = [f"{key}={value}" for key, value in schedule.items()]
            step = replace(step, words=[*step.words, *QUIET, *settings])
        run(step, args.threads, environment)
        if step.name in TRAINING_HOURS:
            check_trained(step, out / step.name)
        assert step.output is not None
        step.output.parent.mkdir(parents=True, exist_ok=True)
        step.output.touch()


if __name__ == "__main__":
    sys.exit(run_command(main, "pretrain_bodies"))
