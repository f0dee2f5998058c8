"""Steps of a recipe, each a `cogvideo` command, and how to run them: shared by scripts/pretrain_*.py."""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogvideo.cli.main import run_child

ROOT = Path(__file__).resolve().parents[1]
PORT = "29417"  # not the launcher's default, which another run on this machine may use


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    output: Path | None
    """Exists once the step is finished; None: the command itself resumes or skips what is done."""
    words: list[str]
    processes: int = 1

    @property
    def command(self) -> list[str]:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        launcher = [deepspeed, "--num_accelerators", str(self.processes), "--master_port", PORT, "--module"]
        return [*(launcher if self.processes > 1 else [sys.executable, "-m"]), "cogvideo", *self.words]


def choose_steps(steps: Sequence[Step], only: Sequence[str] | None) -> list[Step]:
    """The steps named in `only`, even if finished; without it, the unfinished ones. Exits if a name is unknown."""
    if not only:
        return [step for step in steps if not (step.output and step.output.exists())]
    unknown = set(only) - {step.name for step in steps}
    if unknown:
        print(
            f"no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}", file=sys.stderr
        )
        sys.exit(2)
    return [step for step in steps if step.name in only]


def run(step: Step, threads: int | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Run one command, on `threads` threads per process (default: all cores); exit if it fails."""
    threads = threads or max(1, (os.cpu_count() or 1) // step.processes)
    print(f"\n[{step.name}] {shlex.join(step.command)}", flush=True)
    start = time.time()
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
    code = run_child(step.command, env=variables).returncode
    if code:
        sys.exit(f"[{step.name}] failed with exit code {code}; run again to continue from there")
    print(f"[{step.name}] took {(time.time() - start) / 60:.1f} min", flush=True)
