"""scripts/bench_speculation.py, on the bundled weights: what it counts, and one line for input it cannot use."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_speculation.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


def test_parts_of_a_clip() -> None:
    done = run("--caption", "the red digit 3 moves left slowly", "--repeats", "1", "rounds=1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    counted = [(line["part"], line["tokens"]) for line in lines]
    assert counted == [("first frame", 25), ("key frames", 100), ("round 1", 100)]
    assert all(line["equal"] for line in lines)
    for line in lines:
        assert 1 <= line["forwards"] < line["forwards_sequential"]


def test_a_video_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"no video")
    done = run("--video", str(tmp_path / "no.mp4"), "--caption", "x")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "no.mp4" in done.stderr
