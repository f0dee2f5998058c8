"""The full recipe of the bundled weights, from nothing: data, both tokenizers, the trunk and both stages.

    python scripts/pretrain_tiny.py [--out DIR] [--only STEP ...]

Each step is one `cogvideo` command, printed before it runs. Killed and run again, the recipe goes on where it
was. The two stages need only the trunk, so they train side by side, a core each. Stage 1 learns in three runs, each
from where the one before it ended: first frames given, then learned too, then once more at a lower rate.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("runs/tiny")


@dataclass(frozen=True)
class Step:
    """One command. Steps of one stage of the recipe that share `together` run at the same time."""

    name: str
    makes: Path | None
    """There when the step is done; None: the command itself goes on from where it was, if anything is left to do."""
    words: list[str]
    together: str | None = None


def recipe(out: Path) -> list[Step]:
    """All steps, in order. The folders are those that configs/train/tiny_*.yaml name."""
    captions, tokenizer = WORK / "videos/captions.jsonl", WORK / "tokenizer/export/image_tokenizer"

    def videos(name: str, count: int, seed: int) -> Step:
        words = ["digits", "--out", str(WORK / name), "--split", "train", "--count", str(count), "--seed", str(seed)]
        return Step(name, WORK / name / "captions.jsonl", words)

    def prepare(name: str, source: Path, *how: str) -> Step:
        words = ["prepare", "--captions", str(source), *how, "--out", str(WORK / name), "--config"]
        return Step(name, WORK / name / "manifest.json", [*words, "configs/data/digits.yaml"])

    def train(name: str, *settings: str, run: str | None = None, together: str | None = None) -> Step:
        words = ["train", "--config", f"configs/train/tiny_{name}.yaml", "--resume", *settings]
        return Step(run or name, None, [*words, f"run_dir={WORK / run}"] if run else words, together)

    vocabulary = ["vocabulary", "--captions", str(captions), "--tokenizer", str(tokenizer)]
    parts = {
        "--text": WORK / "text.model",
        "--tokenizer": tokenizer,
        "--trunk": WORK / "trunk/export/trunk",
        "--sequential": WORK / "sequential/export/sequential",
        "--interpolation": WORK / "interpolation/export/interpolation",
        "--sampling": Path("configs/sample/tiny.yaml"),
        "--out": out,
    }
    return [
        videos("videos", 12000, 1),
        videos("validation_videos", 100, 2),
        prepare("frames", captions, "--frames"),
        train("tokenizer"),
        prepare("clips", captions, "--tokenizer", str(tokenizer)),
        prepare("validation_clips", WORK / "validation_videos/captions.jsonl", "--tokenizer", str(tokenizer)),
        Step("vocabulary", WORK / "text.model", [*vocabulary, "--out", str(WORK / "text.model")]),
        train("image"),
        train("sequential", "model.learn_first_frame=false", run="sequential_given", together="stages"),
        train("interpolation", together="stages"),
        train(
            *("sequential", "train.steps=1400", "optimiser.lr=5e-4"),
            f"init.checkpoint={WORK / 'sequential_given/export/sequential'}",
            run="sequential_first",
        ),
        train(
            *("sequential", "train.steps=450", "optimiser.lr=3e-4", "optimiser.warmup_steps=30"),
            *("optimiser.min_lr_ratio=0.03", "train.seed=1"),
            f"init.checkpoint={WORK / 'sequential_first/export/sequential'}",
        ),
        Step(
            "bundle",
            out / "bundle.json",
            ["bundle", "--overwrite", "--clusters", "64", *(str(word) for pair in parts.items() for word in pair)],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cogvideo/weights/tiny"), help="where the bundle goes")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone, whether or not they were done")
    args = parser.parse_args()
    os.chdir(ROOT)

    steps = recipe(args.out)
    if args.only:
        unknown = set(args.only) - {step.name for step in steps}
        if unknown:
            parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}")
        steps = [step for step in steps if step.name in args.only]
    else:
        steps = [step for step in steps if not (step.makes and step.makes.exists())]
    while steps:
        first, *rest = steps
        batch = [first, *(step for step in rest if first.together and step.together == first.together)]
        steps = [step for step in steps if step not in batch]
        run(batch)


def run(batch: list[Step]) -> None:
    """Run the commands of `batch` at once, sharing out the cores; stop at the first that fails."""
    threads = max(1, (os.cpu_count() or 1) // len(batch))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began, running = time.time(), []
    for step in batch:
        print(f"\n[{step.name}] cogvideo {shlex.join(step.words)}", flush=True)
        running.append(subprocess.Popen([sys.executable, "-m", "cogvideo", *step.words], env=environment))
    codes = [process.wait() for process in running]
    for step, code in zip(batch, codes, strict=True):
        if code:
            sys.exit(f"[{step.name}] failed with exit code {code}; run again to go on from there")
        print(f"[{step.name}] took {(time.time() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
