"""Steps of a recipe, each a `cogvideo` command: how to run them, skip those that are done, and fill a given time."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cogvideo.training.metrics import MetricsFile

LAUNCHER = ("--standalone", "--local-addr", "127.0.0.1")
"""Options of torchrun: one machine, and a free port, so that runs side by side do not meet."""
STOP_SECONDS = 3600
"""How long torchrun waits for processes to save after a signal before it kills them; by default half a minute."""
CALIBRATION_STEPS = 15
LEAST_STEPS = 10
"""Minimum number of steps after those that measure the speed."""
CONTINUOUS_STEPS = 200
"""Steps of tokenizer training before its codebook is made, if the schedule is long enough."""
SAVE_SECONDS = 120
SAFETY = 0.9
"""Share of the remaining time that a schedule fills; validation, checkpoints and sample sheets take the rest."""
QUIET = ("log.every=5", "log.preview_every=0")


class StepError(ValueError):
    """A step that failed or was stopped; running the recipe again continues there."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    output: Path | None
    """Exists once the step is finished; None: the command itself resumes or skips what is done."""
    words: list[str]
    processes: int = 1
    prepare: Callable[[], None] | None = None
    """Writes the config files that the command reads, which may depend on the steps before."""

    @property
    def is_done(self) -> bool:
        return self.output is not None and self.output.exists()

    @property
    def command(self) -> list[str]:
        launcher = ["-m", "torch.distributed.run", *self._launcher_options] if self.processes > 1 else []
        return [sys.executable, *launcher, "-m", "cogvideo", *self.words]

    @property
    def shown(self) -> str:
        """The command as one would type it."""
        launcher = ["torchrun", *self._launcher_options, "-m"] if self.processes > 1 else []
        return shlex.join([*launcher, "cogvideo", *self.words])

    @property
    def _launcher_options(self) -> list[str]:
        return [*LAUNCHER, "--nproc-per-node", str(self.processes)]


def choose_steps(steps: Sequence[Step], only: Sequence[str] | None) -> list[Step]:
    """The steps named in `only`, even if finished; without it, the unfinished ones.

    Raises: ValueError for an unknown name.
    """
    if not only:
        return [step for step in steps if not step.is_done]
    unknown = set(only) - {step.name for step in steps}
    if unknown:
        raise ValueError(
            f"no step is named {', '.join(sorted(unknown))}; choose from {', '.join(step.name for step in steps)}"
        )
    return [step for step in steps if step.name in only]


def run(step: Step, threads: int | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Run one command, on `threads` threads per process (default: all cores).

    Several processes run in a session of their own: a terminal's Ctrl-C reaches them only through this process, once,
    since torchrun leaves its processes behind if signals interrupt its wait for them.
    Raises: StepError if the command fails.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // step.processes)
    print(f"\n[{step.name}] {step.shown}", flush=True)
    start = time.time()
    variables = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_SECONDS), **os.environ, "OMP_NUM_THREADS": str(threads)}
    options: dict[str, Any] = {"start_new_session": True} if step.processes > 1 else {}
    code = run_child(step.command, env=variables | dict(environment or {}), **options).returncode
    if code:
        raise StepError(f"[{step.name}] failed with exit code {code}; run again to continue from there")
    print(f"[{step.name}] took {(time.time() - start) / 60:.1f} min", flush=True)


def run_child(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[Any]":
    """Like `subprocess.run`, but when interrupted, terminate the command and wait for it to save or clean up.

    `subprocess.run` would kill it.
    """
    with subprocess.Popen(command, **options) as child:
        try:
            output, errors = child.communicate()
        except (KeyboardInterrupt, SystemExit):
            child.terminate()  # Ctrl-C on a terminal has already reached it; commands treat both as one request
            child.communicate()
            raise
    return subprocess.CompletedProcess(command, child.returncode, output, errors)


def is_trained(run_dir: Path) -> bool:
    """Whether a run has reached its last step; a run that was asked to stop also ends without an error."""
    steps = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"]
    return (run_dir / "checkpoints/latest").read_text(encoding="utf-8").strip() == f"step_{steps:08d}"


def check_trained(step: Step, run_dir: Path) -> None:
    """Raises: StepError if a training step has ended before its last step."""
    if not is_trained(run_dir):
        raise StepError(f"[{step.name}] was stopped; run again to continue")


def schedule_for(
    step: Step, run_dir: Path, seconds: float, threads: int | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, int]:
    """train.steps and log.save_every for a training run that is to end in `seconds` from now.

    Unless the run has been started, its first CALIBRATION_STEPS steps are trained here to measure the speed.
    """
    start = time.monotonic()
    if not _logged(run_dir):
        words = [*step.words, *QUIET, f"train.stop_at={CALIBRATION_STEPS}"]
        run(replace(step, words=words), threads, environment)
    number, seconds_per_step = _logged(run_dir)[-1]
    startup = max(0.0, time.monotonic() - start - number * seconds_per_step)  # paid again by the next run
    left = SAFETY * (start + seconds - time.monotonic() - startup)
    steps = max(number + LEAST_STEPS, number + int(left / seconds_per_step))
    if left < LEAST_STEPS * seconds_per_step:
        print(f"[{step.name}] too little time is left; training for the minimum, {steps} steps in all", flush=True)
    return {"train.steps": steps, "log.save_every": max(1, int(SAVE_SECONDS / seconds_per_step))}


def continuous_steps(steps: int, taken: int = 0) -> int:
    """tokenizer.continuous_steps for a training run of `steps` steps.

    The codebook is made at exactly that step, so it must come after the `taken` steps already trained.
    """
    return max(taken + 1, min(CONTINUOUS_STEPS, steps // 4))


def _logged(run_dir: Path) -> list[tuple[int, float]]:
    """Step and seconds per step from each line of a run's metrics that has both."""
    records = MetricsFile(run_dir / "metrics.jsonl").read()
    return [(record["step"], record["seconds_per_step"]) for record in records if "seconds_per_step" in record]
