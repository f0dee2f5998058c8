"""scripts/bench_full_size.py at a small size: writes once, maps, samples a row, and says what it took."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.scripts import load_script

SMALL = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.frame_side=4",
    "model.vocabulary.size=300",
    "model.vocabulary.num_image_tokens=200",
    "model.vocabulary.pad=200",
    "model.vocabulary.newline=201",
    "model.vocabulary.start_of_image=202",
]


def test_a_row_is_sampled_and_weights_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("bench_full_size")  # it samples in a process of its own

    def bench() -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["bench_full_size.py", "--work", str(tmp_path), *SMALL])
        assert script.main() == 0
        return json.loads(capsys.readouterr().out)

    first, again = bench(), bench()
    assert len(first["tokens"]) == 4
    assert max(first["tokens"]) < 200
    assert first["tokens"] == again["tokens"]
    assert first["token_seconds"] > 0
    assert first["peak_resident_gib"] < 4
    assert first["write_seconds"] is not None
    assert again["write_seconds"] is None
