"""Compare LoRA, with and without the word embeddings, with finetuning of all weights, and averaged with last weights.

    python scripts/compare_finetuning.py --out DIR [--steps 100] [--seeds 0 1 2] [--clips 300] [--prompts 48]

Stage 1 of the bundled weights is finetuned by `cogvideo train` on moving digits in colours that it never saw
(`cogvideo digits --palette new`), once per arm and seed, for the same number of steps. Measured for the averaged (EMA)
and the last weights of each run: the loss on validation clips and, by the digit benchmark's probes, how often the key
frames over 4 s match the caption, for captions of new colours and of the old ones (what has been forgotten). For each
run: seconds per step, and the process's peak memory beside the planner's estimate.

If interrupted, run it again: finished steps are skipped and training resumes. More seeds or another number of prompts
may be given then. OUT gets results.json, results.md and curves.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablate import draw

from cogvideo.checkpoint.load import load_model
from cogvideo.cli.main import main as cogvideo
from cogvideo.cli.main import run_command
from cogvideo.config import load_config
from cogvideo.evaluation.likelihood import open_prepared_clips, score_clips
from cogvideo.files import BUNDLED_WEIGHTS, read_json, write_json
from cogvideo.inference.backends import install_kernels
from cogvideo.planning.budgets import training_budget
from cogvideo.recipes.steps import Step, is_trained, run, run_child
from cogvideo.sampling.bundle import load_sample_config, open_bundle
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.training.config import TrainConfig
from cogvideo.training.metrics import MetricsFile
from cogvideo.training.resources import machine_of, planned_model, planned_settings
from cogvideo.worlds.benchmark import NUM_KEY_FRAMES, ClipSet, generate_with, reconstruct, set_name
from cogvideo.worlds.digits.benchmark import draw_captions, real_frames
from cogvideo.worlds.digits.probes import probe_clips, summarise
from cogvideo.worlds.digits.render import CANVAS

ROOT = Path(__file__).resolve().parents[1]
BASE = BUNDLED_WEIGHTS / "sequential"
TEXT = BUNDLED_WEIGHTS / "text.model"
CONFIG = ROOT / "configs/train/finetune_sequential.yaml"
SETTINGS = (
    *("train.batch_size=4", "train.ema_decay=0.98", "train.num_threads=1"),
    *("optimiser.warmup_steps=10", "log.every=5", "log.preview_every=0", "log.peak_tflops=0.1"),
)
ARMS = {
    "all weights": ["optimiser.lr=2e-4"],
    "LoRA, rank 16": ["lora.rank=16", "optimiser.lr=2e-3"],
    "LoRA with embeddings": ["lora.rank=16", "optimiser.lr=2e-3", "lora.targets=[spatial,temporal,mlp,embeddings]"],
}
"""Each with a learning rate that suits it, about ten times as high for adapters."""
WEIGHTS = ("ema", "last")
PALETTES = ("new", "basic")
SECONDS = 4.0
SCORED = 60
"""Validation clips whose loss is measured after training."""
IDLE = """
import cogvideo.training.trainer, deepspeed, re
print(re.search("VmRSS:.*?(\\\\d+)", open("/proc/self/status").read())[1])
"""
"""Prints the KiB that a process takes before it builds anything."""


@dataclass(frozen=True)
class Comparison:
    out: Path
    steps: int
    seeds: list[int]
    clips: int
    prompts: int

    def begin(self) -> None:
        """Record what the runs depend on. Raises: ValueError if the folder was begun with something else."""
        file, settings = self.out / "comparison.json", {"steps": self.steps, "clips": self.clips}
        if file.is_file():
            if (before := read_json(file, dict[str, Any])) != settings:
                raise ValueError(f"{self.out} was begun with {before}, got {settings}; give the same, or another --out")
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)

    def data_steps(self) -> list[Step]:
        """The unfinished steps that make videos in new colours and token clips of them, for training and validation."""
        steps = []
        for seed, (name, count) in enumerate({"train": self.clips, "validation": max(1, self.clips // 5)}.items(), 1):
            videos, clips = self.out / f"{name}_videos", self.out / name
            words = ["digits", "--out", videos, "--count", count, "--seed", seed, "--palette", "new"]
            steps.append(Step(videos.name, videos / "captions.jsonl", [str(word) for word in words]))
            words = ["prepare", "--captions", videos / "captions.jsonl", "--out", clips]
            words += ["--config", ROOT / "configs/data/digits.yaml", "--tokenizer", BUNDLED_WEIGHTS / "image_tokenizer"]
            words += ["clips.clip_seconds=[4,2,1]", "clips.max_clips_per_length=1"]
            steps.append(Step(name, clips / "manifest.json", [str(word) for word in words]))
        return [step for step in steps if not step.is_done]

    def run_dir(self, arm: str, seed: int) -> Path:
        return self.out / "runs" / arm.replace(", ", "_").replace(" ", "_") / f"seed_{seed}"

    def words(self, arm: str, seed: int) -> list[str]:
        """The settings of a run, as `cogvideo train` takes them."""
        own = [f"run_dir={self.run_dir(arm, seed)}", f"train.steps={self.steps}", f"train.seed={seed}"]
        data = [f"data.path={self.out / 'train'}", f"data.validation={self.out / 'validation'}"]
        every = [f"log.validate_every={max(1, self.steps // 3)}", f"log.save_every={self.steps}"]
        return [*SETTINGS, *ARMS[arm], *own, *data, *every, f"data.text_tokenizer={TEXT}", f"init.checkpoint={BASE}"]

    def train(self, arm: str, seed: int) -> dict[str, Path]:
        """Train a run to its end unless it is finished; returns its checkpoints, one for each of WEIGHTS."""
        run_dir = self.run_dir(arm, seed)
        models = {weights: run_dir / weights for weights in WEIGHTS}
        for weights, folder in models.items():
            if folder.is_dir():
                continue
            words = ["train", "--resume", "--config", str(CONFIG), *self.words(arm, seed), f"export.weights={weights}"]
            step = Step(f"{arm}, seed {seed}, {weights}", None, words)
            if not (run_dir / "checkpoints/latest").is_file() or not is_trained(run_dir):
                run(step, threads=1)  # in a process of its own, whose memory it measures
                if not is_trained(run_dir):
                    raise ValueError(f"{run_dir} was stopped; run again to continue")
            else:
                call(words)  # a finished run: exports again
            if "lora" in arm.lower():
                call(["merge", str(BASE), "--adapter", str(run_dir / "export/adapter"), "--out", str(folder)])
            else:
                (run_dir / "export/sequential").rename(folder)
        return models

    def measure(self, model: Path, file: Path) -> dict[str, Any]:
        """Loss and probe results of a checkpoint, kept in `file`."""
        if not file.is_file():
            scored = load_model(model, dtype=torch.float32)
            source = open_prepared_clips(self.out / "validation", scored.config, TEXT, PromptFormat())
            means = score_clips(
                scored, source, file.with_suffix(".safetensors"), count=min(SCORED, source.count), batch_size=20
            )
            found: dict[str, Any] = {"loss": float(np.mean(means.sums / means.clips))}
            pipeline = pipeline_of(model)
            generate = generate_with(pipeline, pipeline.config, CANVAS)
            for palette in PALETTES:
                captions = draw_captions(self.prompts, 0, palette)
                frames = generate(ClipSet(set_name(SECONDS), tuple(caption.text for caption in captions), SECONDS))
                assert frames is not None
                found[palette] = shares(frames, captions)
            write_json(file, found)
        return json.loads(file.read_text(encoding="utf-8"))

    def ceiling(self) -> dict[str, Any]:
        """What the probes find in the captions' real clips after the image tokenizer's round trip."""
        tokenizer, times = pipeline_of(BASE).image_tokenizer, np.linspace(0, SECONDS, NUM_KEY_FRAMES)
        found = {}
        for palette in PALETTES:
            captions = draw_captions(self.prompts, 0, palette)
            found[palette] = shares(reconstruct(tokenizer, real_frames(captions, times)), captions)
        return found


def call(words: list[str]) -> None:
    """Run a command in this process. Raises: SystemExit with its exit code if it fails."""
    if code := cogvideo(words):
        raise SystemExit(code)


def pipeline_of(sequential: Path) -> Pipeline:
    """The bundled pipeline with another stage 1, and without stage 2."""
    bundle = open_bundle(BUNDLED_WEIGHTS, "fp32")
    model = load_model(sequential, dtype=torch.float32)
    install_kernels(model)
    return Pipeline(
        encode=bundle.text_tokenizer.encode,
        prompt_format=bundle.config.prompt,
        image_tokenizer=bundle.image_tokenizer,
        sequential=model,
        labels=bundle.labels,
        config=load_sample_config(BUNDLED_WEIGHTS, [], []),
    )


def shares(frames: Any, captions: Any) -> dict[str, float]:
    """The share of clips that are right in each respect."""
    times = np.linspace(0, SECONDS, NUM_KEY_FRAMES)
    summary = summarise(probe_clips(frames, [caption.clip for caption in captions], times))
    return {name: getattr(summary, name).value for name in ("digit", "colour", "direction", "all_right")}


def costs(comparison: Comparison, arm: str) -> dict[str, float]:
    """Seconds per step and memory of an arm's runs, and the planner's estimate."""
    words = comparison.words(arm, comparison.seeds[0])
    config = load_config(TrainConfig, [CONFIG], words)
    device = torch.device("cpu")
    model = planned_model(config)
    assert model is not None
    plan = training_budget(model, machine_of(device), planned_settings(config, 1))
    logged = [MetricsFile(comparison.run_dir(arm, seed) / "metrics.jsonl").read() for seed in comparison.seeds]
    seconds = [line["seconds_per_step"] for lines in logged for line in lines if "seconds_per_step" in line]
    peaks = [max(line["memory_mib"] for line in lines if "memory_mib" in line) for lines in logged]
    return {
        "seconds_per_step": statistics.median(seconds),
        "fastest_seconds_per_step": min(seconds),
        "peak_mib": statistics.mean(peaks),
        "planned_mib": plan.total / 2**20,
    }


def idle_mib() -> float:
    """Memory of a process that has imported what training needs."""
    done = run_child([sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return int(done.stdout.split()[-1]) / 1024


def as_tables(results: dict[str, Any]) -> str:
    """The results in Markdown."""

    def cells(found: list[dict[str, Any]]) -> list[str]:
        losses = [one["loss"] for one in found if "loss" in one]
        row = [_mean(losses, "{:.4f}") if losses else "-"]
        for palette, name in (("new", "colour"), ("new", "all_right"), ("basic", "colour"), ("basic", "all_right")):
            row.append(_mean([100 * one[palette][name] for one in found], "{:.0f}") + " %")
        return row

    rows = [("tokenizer's round trip", "", cells([results["ceiling"]])), ("before", "", cells([results["before"]]))]
    for arm, by_weights in results["after"].items():
        rows += [(arm, weights, cells(list(by_seed.values()))) for weights, by_seed in by_weights.items()]
    settings = results["settings"]
    lines = [
        f"After {settings['steps']} steps of 4 clips; mean over seeds {settings['seeds']} ± standard deviation; "
        f"{settings['prompts']} captions of each palette.",
        "",
        "| trained | weights | validation loss | new colours: colour | all right | old colours: colour | all right |",
        "|---|---|---|---|---|---|---|",
        *(f"| {arm} | {weights} | {' | '.join(row)} |" for arm, weights, row in rows),
        "",
        "| trained | median s per step | fastest | peak above the idle process, MiB | planned, MiB |",
        "|---|---|---|---|---|",
    ]
    for arm, cost in results["costs"].items():
        above = cost["peak_mib"] - results["idle_mib"]
        numbers = f"{cost['seconds_per_step']:.2f} | {cost['fastest_seconds_per_step']:.2f} | {above:.0f}"
        lines.append(f"| {arm} | {numbers} | {cost['planned_mib']:.0f} |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float], form: str) -> str:
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=100, help="of each run (default: 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--clips", type=int, default=300, help="training videos (default: 300)")
    parser.add_argument("--prompts", type=int, default=48, help="captions of each palette (default: 48)")
    args = parser.parse_args()
    if min(args.steps, args.clips, args.prompts) < 1 or min(args.seeds) < 0:
        parser.error("--steps, --clips and --prompts must be above 0, --seeds at least 0")
    comparison = Comparison(args.out.resolve(), args.steps, args.seeds, args.clips, args.prompts)
    comparison.begin()
    os.chdir(ROOT)
    for step in comparison.data_steps():
        run(step, threads=1)
    models = {(arm, seed): comparison.train(arm, seed) for seed in args.seeds for arm in ARMS}
    after: dict[str, dict[str, dict[int, Any]]] = {arm: {weights: {} for weights in WEIGHTS} for arm in ARMS}
    for (arm, seed), by_weights in models.items():
        for weights, model in by_weights.items():
            after[arm][weights][seed] = comparison.measure(model, model.with_name(f"{weights}_{args.prompts}.json"))
    results = {
        "settings": {**asdict(comparison), "out": comparison.out.name},
        "ceiling": comparison.ceiling(),
        "before": comparison.measure(BASE, comparison.out / f"before_{args.prompts}.json"),
        "after": after,
        "costs": {arm: costs(comparison, arm) for arm in ARMS},
        "idle_mib": idle_mib(),
    }
    write_json(comparison.out / "results.json", results)
    table = as_tables(results)
    (comparison.out / "results.md").write_text(table, encoding="utf-8")
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for arm, seed in models:
        points = [
            (int(line["step"]), line["validation/loss"])
            for line in MetricsFile(comparison.run_dir(arm, seed) / "metrics.jsonl").read()
            if "validation/loss" in line
        ]
        curves.setdefault(arm, []).append(points)
    draw(curves, comparison.out / "curves.png")
    print(table, end="")


if __name__ == "__main__":
    sys.exit(run_command(main, "compare_finetuning"))
