"""Ablation studies: train every variant with several seeds for the same number of steps, and compare them.

    python scripts/ablate.py [--study configs/ablate/digits.yaml] [--only VARIANT ...] [--seeds N ...] [--steps N]
                             [--out DIR] [key=value ...]

Each run is `cogvideo train` in OUT/runs/VARIANT/INDEX/seed_N. Finished runs are skipped and unfinished ones resumed, so
an interrupted study continues; with settings that differ from those that a run was begun with, it is refused. OUT gets
results.json, results.md (a table with the spread over seeds) and curves.png, updated after every variant. They hold
every variant that is finished, also those that --only leaves out, unless their settings differ.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cogvideo.cli.main import run_command
from cogvideo.config import leaves, load_config, to_dict
from cogvideo.recipes.steps import run_child
from cogvideo.training.config import TrainConfig, changed_settings
from cogvideo.training.sizes import SIZES

SCORE = "validation/loss"
COMPARED = ("train.steps", "log.validation_batches")
"""Settings that change a score although resumed runs are free to change them."""
IGNORED = ("train.num_threads",)
"""Settings that change no more than rounding."""


@dataclass(frozen=True)
class Run:
    """One training run of a variant; a variant may have several, such as its two stages."""

    overrides: list[str]
    frames: int
    """Number of frames that its loss is averaged over: its weight in the variant's score."""
    share: float
    """Its fraction of the study's steps."""


@dataclass(frozen=True)
class Study:
    config: Path
    out: Path
    seeds: list[int]
    steps: int
    overrides: list[str]
    """Settings of every run, which the variant's own override."""
    variants: dict[str, tuple[str, list[Run]]]
    """By name: a description and the runs."""


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises: ValueError in one line for missing or unknown keys.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = {"config", "out", "seeds", "steps", "set", "variants"}
    if not isinstance(values, dict) or values.keys() != expected:
        raise ValueError(f"{path}: expected the keys {', '.join(sorted(expected))}")
    variants = {}
    for name, variant in values["variants"].items():
        if not isinstance(variant, dict) or variant.keys() != {"what", "runs"}:
            raise ValueError(f"{path}: variant {name} needs `what` and `runs`")
        runs = [Run(run["set"], run.get("frames", 1), run.get("share", 1.0)) for run in variant["runs"]]
        if abs(sum(run.share for run in runs) - 1) > 1e-6:
            raise ValueError(f"{path}: the shares of variant {name} do not sum to 1; all variants must get equal steps")
        variants[name] = (variant["what"], runs)
    return Study(Path(values["config"]), Path(values["out"]), values["seeds"], values["steps"], values["set"], variants)


@dataclass(frozen=True)
class Job:
    """A run of a variant with one seed."""

    config: Path
    words: list[str]
    """Its settings, as `cogvideo train` takes them after `config`."""
    folder: Path
    steps: int

    @classmethod
    def of(cls, study: Study, run: Run, seed: int, folder: Path, overrides: list[str]) -> "Job":
        steps = max(1, round(study.steps * run.share))
        fixed = [f"run_dir={folder}", f"train.steps={steps}", f"train.seed={seed}"]
        defaults = [f"log.every={min(20, steps)}", f"optimiser.warmup_steps={max(1, min(100, steps // 10))}"]
        return cls(study.config, [*defaults, *study.overrides, *run.overrides, *overrides, *fixed], folder, steps)

    def changes(self) -> str:
        """The settings of a run with results, as far as they differ now and that can change its score."""
        stored = self.folder / "config.yaml"
        if not stored.is_file() or not (self.is_finished or any(self.folder.glob("checkpoints/step_*"))):
            return ""
        before = to_dict(load_config(TrainConfig, [stored]))
        # sizes that follow from the data stay as they were
        sizes = {group: {name: before[group][name] for name in names} for group, names in SIZES.items()}
        now = to_dict(load_config(TrainConfig, [self.config], self.words, derive=lambda given: sizes))
        found = [change for change in changed_settings(before, now) if change[0] not in IGNORED]
        values = [dict(leaves(settings)) for settings in (before, now)]
        found += [(key, values[0][key], values[1][key]) for key in COMPARED if values[0][key] != values[1][key]]
        return ", ".join(f"{key}={was} (now {new})" for key, was, new in found if not _is_fetched(was, new))

    @property
    def is_finished(self) -> bool:
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        return bool(lines) and SCORE in lines[-1] and json.loads(lines[-1])["step"] == self.steps

    def train(self) -> None:
        """Train to the end, unless that is done."""
        if not self.is_finished:
            command = [sys.executable, "-m", "cogvideo", "train", "--resume", "--config", str(self.config)]
            run_child([*command, *self.words], stdout=sys.stderr).check_returncode()  # stdout is for the table

    def records(self) -> list[dict[str, Any]]:
        """The metrics of the trained run. Raises: ValueError if they end without a score."""
        metrics = self.folder / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        if SCORE not in records[-1]:
            raise ValueError(f"{metrics} ends without {SCORE}, which variants are compared by; set data.validation")
        return records


def _is_fetched(was: Any, will_be: Any) -> bool:
    """Whether `was` records the commit of weights from the hub that `will_be` names."""
    recorded = re.fullmatch(r"(.+)@[0-9a-f]{40}", str(was))
    return recorded is not None and recorded[1] == str(will_be).partition("@")[0]


def score(runs: list[Run], losses: list[float]) -> float:
    """Nats per token, a mean over the frames of all runs."""
    return sum(run.frames * loss for run, loss in zip(runs, losses, strict=True)) / sum(run.frames for run in runs)


def summarise(scores: dict[str, dict[int, float]], study: Study) -> list[dict[str, Any]]:
    """One row per variant, the best first. `scores`: by variant and seed."""
    rows = []
    for name, by_seed in scores.items():
        values = list(by_seed.values())
        spread = statistics.stdev(values) if len(values) > 1 else None
        row = {"variant": name, "what": study.variants[name][0], "by_seed": by_seed}
        rows.append(row | {"mean": statistics.mean(values), "spread": spread, "seeds": len(values)})
    return sorted(rows, key=lambda row: row["mean"])


def as_table(rows: list[dict[str, Any]], steps: int) -> str:
    """The results in Markdown."""
    lines = [
        f"Validation loss after {steps} steps, nats per token; the spread is the standard deviation over seeds.",
        "",
        "| variant | what | mean | spread | seeds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "-" if row["spread"] is None else f"{row['spread']:.4f}"
        lines.append(f"| {row['variant']} | {row['what']} | {row['mean']:.4f} | {spread} | {row['seeds']} |")
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Plot the validation loss of each variant's first run over steps: the mean over seeds, and a band of its range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, seeds in curves.items():
        by_step: dict[int, list[float]] = {}
        for points in seeds:
            for step, loss in points:
                by_step.setdefault(step, []).append(loss)
        steps = sorted(by_step)
        means = [statistics.mean(by_step[step]) for step in steps]
        axes.plot(steps, means, label=name, linewidth=1.2, marker="." if len(steps) < 3 else None)
        axes.fill_between(steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], alpha=0.15)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def write_results(study: Study, done: dict[tuple[int, str], list[list[dict[str, Any]]]], out: Path) -> None:
    """Write what `out` gets. `done`: by seed and variant, the metrics of each run."""
    scores: dict[str, dict[int, float]] = {}
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for name, (_, runs) in study.variants.items():
        for seed in study.seeds:
            if (seed, name) in done:
                records = done[seed, name]
                scores.setdefault(name, {})[seed] = score(runs, [of_run[-1][SCORE] for of_run in records])
                points = [(r["step"], r[SCORE]) for r in records[0] if SCORE in r]
                curves.setdefault(name, []).append(points)
    rows = summarise(scores, study)
    results = {"study": str(study.config), "steps": study.steps, "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(as_table(rows, study.steps), encoding="utf-8")
    draw(curves, out / "curves.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("configs/ablate/digits.yaml"))
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="only these variants")
    parser.add_argument("--seeds", nargs="+", type=int, help="replaces the study's")
    parser.add_argument("--steps", type=int, help="replaces the study's")
    parser.add_argument("--out", type=Path, help="replaces the study's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, applied last")
    args = parser.parse_intermixed_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}; expected at least 1")
    try:
        study = read_study(args.study)
        unknown = set(args.only or ()) - study.variants.keys()
        if unknown:
            raise ValueError(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(study.variants)}")
        steps = study.steps if args.steps is None else args.steps
        study = replace(study, seeds=args.seeds or study.seeds, steps=steps, out=args.out or study.out)
        out = study.out
        jobs = {
            (seed, name): [
                Job.of(study, run, seed, out / "runs" / name / str(index) / f"seed_{seed}", args.overrides)
                for index, run in enumerate(runs)
            ]
            for seed in study.seeds  # in the outer loop, so that an interrupted study has every variant
            for name, (_, runs) in study.variants.items()
        }
        chosen = {key: runs for key, runs in jobs.items() if key[1] in (args.only or study.variants)}
        done = {}
        for key, runs in jobs.items():
            changed = [f"{job.folder} was begun with {found}" for job in runs if (found := job.changes())]
            if changed and key in chosen:
                raise ValueError(f"{changed[0]}; give the same, or another --out, or remove the run")
            if changed:
                print(f"ablate: {changed[0]}; the results leave it out", file=sys.stderr)
            elif all(job.is_finished for job in runs):
                done[key] = [job.records() for job in runs]
        for key, runs in chosen.items():
            if key not in done:
                for job in runs:
                    job.train()
                done[key] = [job.records() for job in runs]
                write_results(study, done, out)
        write_results(study, done, out)
    except (ValueError, OSError) as error:
        print(f"ablate: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode  # the run printed the reason
    print((out / "results.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "ablate"))
