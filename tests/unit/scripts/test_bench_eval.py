"""scripts/bench_eval.py: one line per network, and an error if one is not measured."""

import json
import sys

import pytest

from tests.helpers.scripts import load_script

bench = load_script("bench_eval")


def test_one_network(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", "--clips", "1", "--only", "psnr_ssim"])
    bench.main()
    figures = json.loads(capfd.readouterr().out)
    assert (figures["network"], figures["clips"], figures["compare_s"]) == ("psnr_ssim", 1, {})
    assert figures["peak_mb"] >= figures["start_mb"] > 0


def test_a_network_that_is_not_measured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(role: str, folder: object) -> None:
        raise ValueError(role)

    monkeypatch.setattr(bench, "work_on_clips", fail)
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", "--clips", "1", "--only", "motion"])
    with pytest.raises(SystemExit, match="measuring motion failed"):
        bench.main()
