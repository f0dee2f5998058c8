"""The full recipe of the bundled weights, from scratch: data, both tokenizers, the trunk and both stages.

    python scripts/pretrain_tiny.py [--long] [--superres] [--out DIR] [--only STEP ...]

The bundled weights were made with --long --superres. --long trains both stages longer, stage 1 on more videos.
--superres also trains super-resolution, on videos of three times the size: an image tokenizer of the large frames, the
direct and the iterative model.

Each step is one `cogvideo` command, printed before it runs. If interrupted, run it again: finished steps are skipped
and training resumes. The transformers train in two processes with one core each, 15 % faster than one process with two
threads.
"""

import argparse
import os
import sys
from pathlib import Path

from cogvideo.cli.main import run_command
from cogvideo.recipes.steps import Step, choose_steps, run

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("runs/tiny")


def recipe(out: Path, long: bool, superres: bool = False) -> list[Step]:
    """All steps, in order. Folders are those in configs/train/tiny_*.yaml."""
    captions, tokenizer = WORK / "videos/captions.jsonl", WORK / "tokenizer/export/image_tokenizer"

    def videos(name: str, count: int, seed: int, *options: str) -> Step:
        words = ["digits", "--out", str(WORK / name), "--split", "train", "--count", str(count), "--seed", str(seed)]
        words += options
        return Step(name, WORK / name / "captions.jsonl", words)

    def prepare(name: str, source: Path, *options: str, config: str = "digits") -> Step:
        words = ["prepare", "--captions", str(source), "--out", str(WORK / name), *options]
        return Step(name, WORK / name / "manifest.json", [*words, "--config", f"configs/data/{config}.yaml"])

    def train(name: str, processes: int = 2) -> Step:
        return Step(name, None, ["train", "--config", f"configs/train/tiny_{name}.yaml", "--resume"], processes)

    tokens = ("--tokenizer", str(tokenizer))
    vocabulary = ["vocabulary", "--captions", str(captions), *tokens]
    bundle = {
        "--text": WORK / "text.model",
        "--tokenizer": tokenizer,
        "--trunk": WORK / "trunk/export/trunk",
        "--sequential": WORK / ("sequential_long" if long else "sequential") / "export/sequential",
        "--interpolation": WORK / ("interpolation_long" if long else "interpolation") / "export/interpolation",
        "--sampling": Path("configs/sample/tiny.yaml"),
        "--out": out,
    }
    key_frames_alone = ("clips.clip_seconds=[4,2,1]", "clips.max_clips_per_length=1")
    longer = [
        videos("more_videos", 24000, 3),
        prepare("more_clips", WORK / "more_videos/captions.jsonl", *tokens, *key_frames_alone),
        train("sequential_long"),
        train("interpolation_long"),
    ]
    large, validation_large = (WORK / name / "captions.jsonl" for name in ("large_videos", "validation_large_videos"))
    high_res_tokenizer = WORK / "high_res_tokenizer/export/image_tokenizer"
    both_sizes = (*tokens, "--high-res-tokenizer", str(high_res_tokenizer))
    super_resolution = [
        videos("large_videos", 4000, 11, "--pixels", "120"),
        videos("validation_large_videos", 60, 12, "--pixels", "120"),
        prepare("large_crops", large, "--frames", "frame_pixels=120", "crop_pixels=64", "frames_per_video=2"),
        train("high_res_tokenizer", processes=1),
        prepare("pairs", large, *both_sizes, config="digits_pairs"),
        prepare("validation_pairs", validation_large, *both_sizes, config="digits_pairs"),
        train("superres_direct"),
        train("superres_iterative"),
    ]
    if superres:
        bundle |= {
            "--direct": WORK / "superres_direct/export/direct_superres",
            "--iterative": WORK / "superres_iterative/export/iterative_superres",
            "--high-res-tokenizer": high_res_tokenizer,
        }
    return [
        videos("videos", 12000, 1),
        videos("validation_videos", 100, 2),
        prepare("frames", captions, "--frames"),
        train("tokenizer", processes=1),
        prepare("clips", captions, *tokens),
        prepare("validation_clips", WORK / "validation_videos/captions.jsonl", *tokens),
        Step("vocabulary", WORK / "text.model", [*vocabulary, "--out", str(WORK / "text.model"), "--overwrite"]),
        train("image"),
        train("sequential"),
        train("interpolation"),
        *(longer if long else []),
        *(super_resolution if superres else []),
        Step(
            "bundle",
            None,
            ["bundle", "--overwrite", "--clusters", "64", *(str(word) for pair in bundle.items() for word in pair)],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WORK / "bundle", help="bundle (default: runs/tiny/bundle)")
    parser.add_argument("--long", action="store_true", help="train both stages longer, stage 1 on more videos")
    parser.add_argument("--superres", action="store_true", help="also train super-resolution")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps, even if finished")
    args = parser.parse_args()
    os.chdir(ROOT)

    for step in choose_steps(recipe(args.out, args.long, args.superres), args.only):
        run(step)


if __name__ == "__main__":
    sys.exit(run_command(main, "pretrain_tiny"))
