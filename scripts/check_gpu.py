"""Run all checks that need a GPU, in about ten minutes; the most valuable come first.

    python scripts/check_gpu.py                              # on a machine with a GPU; full width, as it will be used
    python scripts/check_gpu.py --only train_sequential      # one check
    python scripts/check_gpu.py --fake                       # on any machine: the same list at tiny sizes

Each check runs in its own process with a time limit, so that one that fails, crashes or hangs does not stop the others.
After --minutes in all, the one that is running is cut off, which is no failure, and the rest are not started. Writes
check_gpu.json and check_gpu.md into --out, and prints the table. Exit code: 0 if nothing that ran failed, 1 otherwise,
2 without a GPU.

`--fake` tries the script itself and as much of each check as a CPU can run: "passed on the CPU" is the same command at
a tiny size, "passed on fake tensors" has shapes and devices but no values, and "needs a GPU" was not run at all.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cogvideo.cli.main import run_command
from cogvideo.files import write_json

ROOT = Path(__file__).resolve().parents[1]
Where = Literal["gpu", "cpu", "fake tensors"]
PASSED: dict[Where, str] = {
    "gpu": "passed",
    "cpu": "passed on the CPU",
    "fake tensors": "passed on fake tensors",
}
FAILED, TIMED_OUT, CUT_OFF, NOT_STARTED, NEEDS_GPU = "failed", "timed out", "cut off", "not started", "needs a GPU"
COLUMNS = {
    "ms": "ms",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "bandwidth_share": "of bandwidth",
    "peak_gb": "peak GB",
    "planned_gb": "planned GB",
    "error": "parity error",
}


@dataclass(frozen=True)
class Check:
    """A command on a GPU, and what stands in for it elsewhere; `{python}`, `{scripts}` and `{work}` are filled in."""

    name: str
    what: str
    seconds: int
    """Time limit on a GPU."""
    command: str
    on_cpu: str | None = None
    on_fake_tensors: str | None = None
    """The name of a check of tests/helpers/fake_cuda/checks.py."""


BENCH_TRAIN = "{python} {scripts}/bench_train.py --device cuda --published --layers 4 --dtype bf16 --steps 5"
TINY_TRAIN = "{python} {scripts}/bench_train.py --quick --hidden 32 --layers 3 --heads 2 --steps 1 --threads 1"
BENCH_DECODE = "{python} {scripts}/bench_decode.py --device cuda --published --dtype bf16 --case stage1 --steps 64"
TINY_DECODE = "{python} {scripts}/bench_decode.py --quick --case stage1 --steps 8 --threads 1"
PART = "{python} {scripts}/check_gpu_parts.py"

CHECKS = (
    Check(
        "packs",
        "the published code's numbers, in float32",
        90,
        "{python} {scripts}/check_packs.py tests/golden --dtype float32 --device cuda",
        on_cpu="{python} {scripts}/check_packs.py tests/golden --dtype float32 --only train_stage1",
    ),
    Check(
        "train_sequential",
        "stage 1, 4 layers, 4 clips, `mlp` recomputed",
        90,
        f"{BENCH_TRAIN} --task sequential --micro-batch 4 --recompute mlp",
        on_cpu=f"{TINY_TRAIN} --task sequential --recompute mlp --micro-batch 2",
    ),
    Check(
        "train_interpolation",
        "stage 2, 4 layers, 4 clips, `mlp` recomputed",
        90,
        f"{BENCH_TRAIN} --task interpolation --micro-batch 4 --recompute mlp",
        on_cpu=f"{TINY_TRAIN} --task interpolation --recompute mlp --micro-batch 2",
    ),
    Check(
        "train_nothing_2",
        "stage 1, 2 clips, nothing recomputed",
        60,
        f"{BENCH_TRAIN} --micro-batch 2",
        on_fake_tensors="train sequential nothing",
    ),
    Check(
        "train_nothing_4",
        "stage 1, 4 clips, nothing recomputed",
        60,
        f"{BENCH_TRAIN} --micro-batch 4",
        on_fake_tensors="train sequential nothing",
    ),
    Check(
        "decode_eager",
        "64 guided steps of stage 1, 48 layers",
        120,
        BENCH_DECODE,
        on_cpu=TINY_DECODE,
    ),
    Check(
        "decode_compiled",
        "the same of 8 layers, compiled and replayed",
        150,
        f"{BENCH_DECODE} --layers 8 --compile",
        on_cpu=None,  # CUDA graphs are the point
    ),
    Check(
        "training_types",
        "tests of types, ZeRO and resuming",
        150,
        "{python} -m pytest -q -p no:cacheprovider tests/gpu/test_train_gpu.py",
    ),
    Check(
        "sampling_parity",
        "tests of sampling in float32, and of streamed layers",
        90,
        "{python} -m pytest -q -p no:cacheprovider tests/gpu/test_sample_gpu.py -k 'float32 or streamed'",
        on_fake_tensors="sample sequential",
    ),
    Check(
        "launcher",
        "DeepSpeed's launcher: save, preview, export, resume",
        180,
        f"{PART} launcher",
        on_cpu=f"{PART} launcher --device cpu",
    ),
    Check("attention_kernels", "which SDPA kernels serve the real shapes, and FlexAttention", 120, f"{PART} attention"),
    Check(
        "start_24gb",
        "a 7.7 B stage 1 made within 24 GB",
        300,
        f"{PART} start",
        on_fake_tensors="start and preview",
    ),
    Check(
        "frozen_int8",
        "stage 1, int8 trunk, `layer` recomputed",
        60,
        f"{BENCH_TRAIN} --micro-batch 4 --recompute layer --trunk-weights int8",
        on_cpu=f"{TINY_TRAIN} --recompute layer --trunk-weights int8",
    ),
    Check(
        "frozen_full",
        "stage 1, bf16 products, `layer` recomputed",
        60,
        f"{BENCH_TRAIN} --micro-batch 4 --recompute layer",
        on_fake_tensors="train interpolation layer frozen",
    ),
    Check(
        "sample_twice",
        "equal tokens of the bundled weights",
        60,
        f"{PART} sample_twice",
        on_cpu=f"{PART} sample_twice --device cpu",
    ),
    Check("superres", "both models against the CPU", 60, f"{PART} superres", on_fake_tensors="upsample"),
    Check("tokenizer", "a training step against the CPU", 60, f"{PART} tokenizer", on_fake_tensors="train tokenizer"),
)


@dataclass
class Result:
    name: str
    what: str
    status: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    """The JSON that the check printed; several lines as a list under `lines`."""
    message: str = ""
    """The end of its error output, if it failed."""


def run(check: Check, where: Where, command: Sequence[str], limit: float) -> Result:
    """Run a check's process; after `limit` seconds, kill it and whatever it started."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = round(time.monotonic() - start, 1)
        output.seek(0)
        errors.seek(0)
        printed, complaint = output.read(), errors.read()
    lines = json_lines(printed)
    figures = lines[0] if len(lines) == 1 else {"lines": lines} if lines else {}
    failed = code != 0 or any(line.get("problem") for line in lines)
    status = TIMED_OUT if code is None else FAILED if failed else PASSED[where]
    message = "" if status == PASSED[where] else (complaint.strip() or printed.strip())[-1500:]
    return Result(check.name, check.what, status, seconds, figures, message)


def json_lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def row(result: Result) -> dict[str, Any]:
    """The columns of the table, filled from a result's figures."""
    lines = result.figures.get("lines", [result.figures])
    merged: dict[str, Any] = {}
    for line in lines:
        merged |= {key: value for key, value in line.items() if value is not None}
    for key in ("step_s_median", "step_s"):
        if key in merged:
            merged["ms"] = round(1e3 * merged[key], 2)
    errors = [line.get(key) for line in lines for key in ("max_logit_error", "loss_error", "error")]
    numbers = [error for error in errors if isinstance(error, int | float)]
    if numbers:
        merged["error"] = f"{max(numbers, key=lambda error: (math.isnan(error), error)):.1e}"
    else:
        merged.pop("error", None)
    return {key: merged.get(key, "") for key in COLUMNS}


def table(results: Sequence[Result]) -> str:
    lines = [
        f"| check | what | result | s | {' | '.join(COLUMNS.values())} |",
        f"|---|---|---|---:|{'---:|' * len(COLUMNS)}",
    ]
    for result in results:
        cells = [result.name, result.what, result.status, f"{result.seconds:.0f}", *map(str, row(result).values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    import torch

    about: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
    if torch.cuda.is_available():
        about |= {
            "gpu": torch.cuda.get_device_name(),
            "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
        }
    return about


def fake_device(folder: Path) -> str | None:
    """Build the library that fake GPU tensors need; returns the reason if that is not possible."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.fake_cuda import build

    if build.has_cuda_build():
        return "this PyTorch has CUDA, which the fake device cannot replace"
    if shutil.which("g++") is None:
        return "no g++"
    try:
        build.build(folder / "device.so")
    except subprocess.CalledProcessError as error:
        return f"the fake device does not compile: {error.stderr.strip()[-200:]}"
    return None


def command_of(check: Check, fake: bool, work: Path) -> tuple[Where, list[str]] | None:
    """Where to run a check, and its command; None if it needs a GPU."""
    if not fake:
        where, words = "gpu", shlex.split(check.command)
    elif check.on_cpu is not None:
        where, words = "cpu", shlex.split(check.on_cpu)
    elif check.on_fake_tensors is not None and (work / "device.so").is_file():
        module = "{python} -W ignore -m tests.helpers.fake_cuda.checks {work}/device.so"
        where, words = "fake tensors", [*module.split(), check.on_fake_tensors]
    else:
        return None
    names = {"python": sys.executable, "scripts": str(ROOT / "scripts"), "work": str(work)}
    filled = [word.format(**names) for word in words]
    return where, filled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="this check only; may be repeated")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all checks together; default %(default)g")
    parser.add_argument("--fake", action="store_true", help="tiny sizes, without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "check_gpu", metavar="DIR")
    args = parser.parse_args()
    names = [check.name for check in CHECKS]
    for name in args.only or ():
        if name not in names:
            parser.error(f"--only {name}; choose among {', '.join(names)}")
    about = machine()
    if about["gpu"] is None and not args.fake:
        parser.error("torch finds no GPU; give --fake to try the list at tiny sizes without one")

    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [check for check in CHECKS if not args.only or check.name in args.only]
    deadline = time.monotonic() + 60 * args.minutes
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.fake and any(check.on_cpu is None and check.on_fake_tensors for check in chosen):
            about["fake tensors"] = fake_device(work) or "available"
        for check in chosen:
            found, left = command_of(check, args.fake, work), deadline - time.monotonic()
            if found is None:
                result = Result(check.name, check.what, NEEDS_GPU)
            elif left < 5:
                result = Result(check.name, check.what, NOT_STARTED)
            else:
                own = math.inf if args.fake else check.seconds
                result = run(check, *found, limit=min(own, left))
                if result.status == TIMED_OUT and left < own:
                    result.status = CUT_OFF
            results.append(result)
            print(f"{result.name}: {result.status} ({result.seconds:.0f} s)", file=sys.stderr, flush=True)
            if result.message:
                print(f"    {result.message.splitlines()[-1]}", file=sys.stderr, flush=True)
            # after each check, so that results are kept whatever happens next
            write_json(args.out / "check_gpu.json", {"machine": about, "checks": [asdict(r) for r in results]})
            (args.out / "check_gpu.md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))
    return 1 if any(result.status in (FAILED, TIMED_OUT) for result in results) else 0


if __name__ == "__main__":
    sys.exit(run_command(main, "check_gpu"))
