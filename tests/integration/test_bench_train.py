"""scripts/bench_train.py at a tiny size: its report, and that the dense and the lean step have the same loss."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_train.py"
SMALL = ["--quick", "--hidden", "32", "--layers", "3", "--heads", "2", "--steps", "1", "--threads", "1"]
KEYS = {"step_s_min", "step_s_median", "cpu_s", "peak_rss_mb", "idle_rss_mb", "loss", "gflops", "matmul_gflops"}


def bench(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(SCRIPT), *SMALL, *words], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("task", ["sequential", "interpolation"])
def test_lean_and_dense_steps_have_the_same_loss(task: str) -> None:
    report = bench("--task", task, "--baseline")
    assert report.keys() >= KEYS
    assert report["loss"] == pytest.approx(report["baseline_loss"], abs=1e-5)
    assert report["matmul_ratio"] == pytest.approx(report["gflops"] / report["matmul_gflops"], abs=0.01)
    assert report["peak_rss_mb"] >= report["idle_rss_mb"] > 0
    assert report["speedup"] > 0


def test_bfloat16_and_recomputed_layers_have_a_similar_loss() -> None:
    assert bench("--dtype", "bf16", "--recompute", "layer")["loss"] == pytest.approx(bench()["loss"], rel=0.02)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--hidden", "30", "--heads", "4"]])
def test_invalid_sizes_are_a_one_line_error(words: list[str]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert words[0].strip("-") in done.stderr.splitlines()[-1]
