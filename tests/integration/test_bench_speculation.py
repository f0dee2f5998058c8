"""scripts/bench_speculation.py, on the bundled weights: what it counts, and one line for input it cannot use."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.scripts import load_script

bench = load_script("bench_speculation")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The script takes one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_speculation.py", *words])
        return bench.main()

    return run


def test_parts_of_a_clip(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--caption", "the red digit 3 moves left slowly", "--repeats", "1", "rounds=1") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    counted = [(line["part"], line["tokens"]) for line in lines]
    assert counted == [("first frame", 25), ("key frames", 100), ("round 1", 100)]
    assert all(line["equal"] for line in lines)
    for line in lines:
        assert 1 <= line["forwards"] < line["forwards_sequential"]


def test_a_video_that_is_none(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.mp4").write_bytes(b"no video")
    assert run("--video", str(tmp_path / "no.mp4"), "--caption", "x") == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "no.mp4" in error
