"""scripts/count_kernels.py on a narrow layer: what it counts, and that compiled layers need least."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "count_kernels.py"


@pytest.mark.slow
def test_one_attention_call_and_compiled_layers_need_fewer_kernels_and_bytes() -> None:
    words = [sys.executable, str(SCRIPT), "--task", "interpolation", "--hidden", "64", "--heads", "1", "--batch", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    tables = [
        [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]
        for table in done.stdout.split("\n\n")
    ]
    rows, steps = tables
    assert [row[:2] for row in rows] == [["interpolation", way] for way in ("blocks", "joined", "compiled")]
    for column in (2, 4):
        blocks, joined, compiled = (int(row[column]) for row in rows)
        assert 10 < compiled < joined < blocks / 2
    for column in (3, 5):
        blocks_gb, joined_gb, compiled_gb = (float(row[column]) for row in rows)
        assert 0 < compiled_gb <= joined_gb < blocks_gb
    assert [row[:2] for row in steps] == [["interpolation", way] for way in ("layer", "joint", "compiled")]
    layer, joint, compiled = (int(row[2]) for row in steps)
    assert 10 < compiled < joint < layer


def test_invalid_sizes_are_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("count_kernels")
    for words, message in ((["--batch", "0"], "--batch 0;"), (["--hidden", "30", "--heads", "4"], "hidden_size=30")):
        monkeypatch.setattr(sys, "argv", ["count_kernels.py", *words])
        with pytest.raises(SystemExit) as caught:
            script.main()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
