"""scripts/bench_superres.py at a tiny size: all three ways give the same hidden states, and each has its figures."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch

from cogvideo.superres import transformer
from tests.helpers.scripts import load_script

bench = load_script("bench_superres")
SMALL = ["--quick", "--layers", "2", "--hidden", "32", "--heads", "2", "--repeats", "1"]
FIGURES = {"cpu_s", "attention_s", "memory_mb", "peak_rss_mb"}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_superres.py", *words])
    return int(bench.main())


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_dense_masks_give_the_same_hidden_states(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(words: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        with redirect_stdout(io.StringIO()) as output, monkeypatch.context() as patch:
            patch.setattr(transformer, "attend_in_tiles", transformer.attend_in_tiles)  # which `measure` replaces
            return subprocess.CompletedProcess(words, run(patch, *words[2:]), output.getvalue())

    monkeypatch.setattr(bench, "run_child", in_this_process)
    threads = ["--threads", str(torch.get_num_threads())]
    assert run(monkeypatch, *SMALL, *threads, "--method", method) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["benchmark"], report["method"]) == ("superres", method)
    ratios = {f"{name}_over_ours" for name in bench.COMPARED}
    assert report["ours"].keys() == FIGURES
    for name in ("dense", "fused"):
        assert report[name].keys() == FIGURES | ratios | {"difference", "other_tokens"}
        assert 0 < report[name]["difference"] < 1e-5 and report[name]["other_tokens"] == 0


def test_other_hidden_states_are_seen() -> None:
    """`compare` can fail."""
    args = bench.make_parser().parse_args([*SMALL, "--method", "direct"])
    ours = torch.randn(1, 144, 32, generator=torch.Generator().manual_seed(0))
    (found,) = bench.compare(args, {"ours": ours, "dense": ours.flip(1)}).values()
    assert found["difference"] > 1 and found["other_tokens"] > 100


@pytest.mark.parametrize(("words", "message"), [(["--repeats", "0"], "--repeats 0 is below 1")])
def test_sizes_below_1_are_refused(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *words)
