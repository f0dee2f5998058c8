"""scripts/bench_train.py at a tiny size: its report, and that the dense and the lean step have the same loss."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.scripts import ROOT, load_script

bench_train = load_script("bench_train")

SMALL = ["--quick", "--hidden", "32", "--layers", "3", "--heads", "2", "--steps", "1", "--threads", "1"]
KEYS = {"step_s_min", "step_s_median", "cpu_s", "peak_rss_mb", "idle_rss_mb", "loss", "gflops", "matmul_gflops"}
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """What the script prints if it measures in this process, whose settings stay as they are."""

    def run(words: list[str]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words)
            bench_train.main()
        return capsys.readouterr().out

    def run_child(words: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        assert words[0] == sys.executable
        return subprocess.CompletedProcess(words, 0, run(words[1:]))

    monkeypatch.setattr(bench_train, "run_child", run_child)
    monkeypatch.setattr(bench_train, "tune_allocator", lambda: None)
    for name in ("set_num_threads", "set_flush_denormal"):
        monkeypatch.setattr(torch, name, lambda value: None)
    monkeypatch.syspath_prepend(ROOT / "scripts")  # for dense_step.py
    return lambda *words: json.loads(run(["bench_train.py", *SMALL, *words]))


def test_the_report_compares_lean_and_dense_steps() -> None:
    words = [sys.executable, str(ROOT / "scripts/bench_train.py"), *SMALL, "--baseline"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report.keys() >= KEYS
    assert report["loss"] == pytest.approx(report["baseline_loss"], abs=1e-5)
    assert report["matmul_ratio"] == pytest.approx(report["gflops"] / report["matmul_gflops"], abs=0.01)
    assert report["peak_rss_mb"] >= report["idle_rss_mb"] > 0
    assert report["speedup"] > 0


def test_lean_and_dense_steps_of_interpolation_have_the_same_loss(bench: Bench) -> None:
    report = bench("--task", "interpolation")
    assert report.keys() >= KEYS
    assert report["loss"] == pytest.approx(bench("--task", "interpolation", "--variant", "dense")["loss"], abs=1e-5)


def test_bfloat16_and_recomputed_layers_have_a_similar_loss(bench: Bench) -> None:
    assert bench("--dtype", "bf16", "--recompute", "layer")["loss"] == pytest.approx(bench()["loss"], rel=0.02)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--hidden", "30", "--heads", "4"]])
def test_invalid_sizes_are_a_one_line_error(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words])
    with pytest.raises(SystemExit) as end:
        bench_train.main()
    assert end.value.code == 2
    assert words[0].strip("-") in capsys.readouterr().err.splitlines()[-1]
