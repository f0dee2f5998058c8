"""scripts/bench_full_size.py at a small size: writes once, maps, samples a row, and says what it took."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_full_size.py"
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


def bench(work: Path) -> dict[str, Any]:
    words = [sys.executable, str(SCRIPT), "--work", str(work), *SMALL]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def test_a_row_is_sampled_and_weights_are_kept(tmp_path: Path) -> None:
    first, again = bench(tmp_path), bench(tmp_path)
    assert len(first["tokens"]) == 4
    assert max(first["tokens"]) < 200
    assert first["tokens"] == again["tokens"]
    assert first["token_seconds"] > 0
    assert first["peak_resident_gib"] < 4
    assert first["write_seconds"] is not None
    assert again["write_seconds"] is None
