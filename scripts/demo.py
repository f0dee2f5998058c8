"""`make demo`: the whole pipeline in a few minutes on two cores, and an HTML report of the results.

    python scripts/demo.py [--work DIR] [--model DIR] [--quick]

Every step is one `cogvideo` command, printed before it runs. Training starts from the bundled weights and is short: it
shows that each part trains, not how the weights were made (scripts/pretrain_tiny.py does).
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
MARK = ".made-by-cogvideo-demo"
PROMPTS = (
    "the red digit 3 moves left slowly",
    "蓝色的数字7向右快速移动",
    "the green digit 0 moves up quickly",
    "黄色的数字4向下缓慢移动",
    "the purple digit 8 moves right slowly",
    "白色的数字2向左快速移动",
)
STEPS = {"tokenizer": 40, "image": 60, "sequential": 40, "interpolation": 30}
MAX_TRAINING_MINUTES = 1.0
"""Per task, however slow the machine."""


class Demo:
    """Runs commands and records how long they took."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.done: list[tuple[str, float]] = []

    def cogvideo(self, *words: str | Path) -> str:
        """Run one command and return its output; progress is shown live. A failure ends the demo."""
        line = "cogvideo " + shlex.join(_relative(word) for word in words)
        print(f"\n$ {line}", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", "cogvideo", *map(str, words)]
        from cogvideo.recipes.steps import run_child

        result = run_child(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        print(result.stdout, end="", flush=True)
        if result.returncode:
            sys.exit(f"demo: this command ended with exit code {result.returncode}; its message is above")
        self.done.append((line, time.monotonic() - started))
        return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/demo", help="folder for everything")
    parser.add_argument("--model", type=Path, default=ROOT / "cogvideo/weights/tiny", help="the weights to start from")
    parser.add_argument("--quick", action="store_true", help="a few steps and clips only, to check that all parts run")
    args = parser.parse_args()

    started = time.monotonic()
    work, model = args.work.resolve(), args.model.resolve()
    _fresh_folder(work)
    demo = Demo(work)
    print("The whole pipeline, small: data, training from the bundled weights, sampling, measuring.")
    _data(demo, model, clips=12 if args.quick else 120)
    _training(demo, model, args.quick)
    prompts = PROMPTS[:2] if args.quick else PROMPTS
    large = ("--upsample", "upsample.noise=shared") if (model / "direct_superres").is_dir() else ()
    demo.cogvideo("sample", *prompts, "--model", work / "weights", "--out", work / "samples", "seed=7", *large)
    captions = 2 if args.quick else 20
    figures = demo.cogvideo(
        *("eval", "digits", "--model", work / "weights", "--num-prompts", str(captions), "--json", work / "eval.json")
    )
    minutes = (time.monotonic() - started) / 60
    _report(demo, figures, captions, minutes)
    print(f"\nDone in {minutes:.1f} minutes. Open this in a browser:\n\n    {work / 'report.html'}\n")


def _data(demo: Demo, model: Path, clips: int) -> None:
    """Real .mp4 files and captions, prepared as frames for the tokenizer and as token clips for the transformers."""
    captions = demo.work / "videos/captions.jsonl"
    digits = ("--config", CONFIGS / "data/digits.yaml")
    demo.cogvideo("digits", "--out", demo.work / "videos", "--count", str(clips), "--seed", "7")
    demo.cogvideo("prepare", "--captions", captions, "--frames", "--out", demo.work / "frames", *digits)
    tokenizer = ("--tokenizer", model / "image_tokenizer")
    demo.cogvideo("prepare", "--captions", captions, *tokenizer, "--out", demo.work / "clips", *digits)


def _training(demo: Demo, model: Path, quick: bool) -> None:
    """Train each task briefly from the bundled weights, then assemble a bundle."""
    work = demo.work
    starts = {"tokenizer": model / "image_tokenizer", "image": model / "trunk"}
    for task, steps in STEPS.items():
        steps = 3 if quick else steps
        data = [f"data.path={work / ('frames' if task == 'tokenizer' else 'clips')}"]
        if task != "tokenizer":
            data += [f"data.text_tokenizer={model / 'text.model'}", f"data.image_tokenizer={model / 'image_tokenizer'}"]
        demo.cogvideo(
            *("train", "--config", CONFIGS / f"train/tiny_{task}.yaml", f"run_dir={work / task}", *data),
            f"init.checkpoint={starts.get(task, model / task)}",
            "data.validation=null",
            *(f"train.steps={steps}", f"train.time_limit_minutes={MAX_TRAINING_MINUTES}"),
            # a small learning rate: the weights are already trained, and these steps are few
            *("optimiser.lr=5e-5", "optimiser.warmup_steps=5", "log.every=1", f"log.preview_every={steps}"),
        )
    parts = {
        "--trunk": work / "image/export/trunk",
        "--sequential": work / "sequential/export/sequential",
        "--interpolation": work / "interpolation/export/interpolation",
    }
    optional = {
        "--sampling": model / "sampling.yaml",
        "--direct": model / "direct_superres",
        "--iterative": model / "iterative_superres",
        "--high-res-tokenizer": model / "high_res_tokenizer",
    }
    parts |= {word: part for word, part in optional.items() if part.exists()}
    demo.cogvideo(
        *("bundle", "--text", model / "text.model", "--tokenizer", model / "image_tokenizer"),
        *(word for part in parts.items() for word in part),
        *("--clusters", "64", "--out", work / "weights"),
    )


def _report(demo: Demo, figures: str, captions: int, minutes: float) -> None:
    """Write one page with all results."""
    from cogvideo import __version__
    from cogvideo.evaluation.html_report import HtmlReport

    work = demo.work
    report = HtmlReport("CogVideo: from a caption to a video, on one small machine")
    report.text(
        "Captions in Chinese and English become clips of moving handwritten digits: key frames one after another, then "
        "three rounds of interpolation to 33 frames. Every picture on this page was made by this run "
        f"(cogvideo {__version__}, {os.cpu_count()} CPU cores, {minutes:.1f} minutes)."
    )
    report.section("Clips from captions")
    samples = json.loads((work / "samples/samples.json").read_text(encoding="utf-8"))["samples"]
    report.pictures([(work / f"samples/{clip['name']}.gif", clip["prompt"]) for clip in samples], width=200)
    if (work / "samples/large").is_dir():
        report.section("The same clips after super-resolution")
        report.pictures([(work / f"samples/large/{clip['name']}.gif", clip["prompt"]) for clip in samples], width=240)
    report.section("The same clips, frame by frame")
    report.pictures([(work / f"samples/{clip['name']}.png", clip["prompt"]) for clip in samples[:3]])

    report.section("Do the clips show what the captions say?")
    report.text(
        f"Independent probes judge clips of {captions} test captions, whose handwritten digits are not in the training "
        "clips. For comparison: the real clips after encoding and decoding by the image tokenizer, an upper bound for "
        "any model, and the real clips themselves. So few captions give wide error margins; `cogvideo eval digits` "
        "judges 200 by default."
    )
    report.preformatted(figures)

    report.section("Image tokenizer reconstructions")
    report.text("Above, frames of real test clips; below, the same frames encoded as 25 tokens each and decoded.")
    report.pictures([(_reconstructions(work), "real and reconstructed")])

    report.section("A little more training of the bundled weights")
    for task in STEPS:
        report.text(f"{task}: {_steps_and_losses(work / task / 'metrics.jsonl')}")
        previews = sorted((work / task / "previews").glob("*.png"))[-1:]
        report.pictures([(path, path.stem) for path in [work / task / "curves.png", *previews]])

    report.section("Commands")
    report.preformatted("\n".join(f"{seconds:6.1f} s  {line}" for line, seconds in demo.done))
    report.text(f"Everything is in {work}.")
    report.write(work / "report.html")


def _steps_and_losses(metrics: Path) -> str:
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [record for record in records if record.get("loss") is not None]
    if not losses:
        return "no step finished within the time limit"
    first, last = losses[0], losses[-1]
    return f"loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}"


def _reconstructions(work: Path) -> Path:
    """A contact sheet of real frames above their reconstructions."""
    import numpy as np

    from cogvideo.media.contact_sheet import contact_sheet
    from cogvideo.tokenizers.image import ImageTokenizer
    from cogvideo.worlds.benchmark import reconstruct
    from cogvideo.worlds.digits.benchmark import draw_captions, real_frames

    frames = real_frames(draw_captions(12, seed=1), np.array([1.0]))
    decoded = reconstruct(ImageTokenizer.load(work / "weights/image_tokenizer"), frames)
    path = work / "reconstructions.png"
    contact_sheet(path, [frames[:, 0], decoded[:, 0]], ["real", "reconstructed"], scale=2)
    return path


def _fresh_folder(work: Path) -> None:
    """Empty the folder if an earlier demo made it; refuse any other."""
    if work.is_dir() and any(work.iterdir()):
        if not (work / MARK).is_file():
            sys.exit(f"demo: {work} was not made by this script; give another folder with --work")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / MARK).touch()


def _relative(word: str | Path) -> str:
    """A word as typed from the root of the repository."""
    return str(word).replace(f"{ROOT}/", "")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cogvideo.cli.main import run_command

    sys.exit(run_command(main, "demo"))
