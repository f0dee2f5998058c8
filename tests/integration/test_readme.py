"""The README's pipeline, as written there, in small: every command runs on what the one before it made."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALLER = {
    "digits": [],
    "train": ["train.steps=3", "train.batch_size=8", "log.every=1", "data.validation=null"],
    "tokenizer": ["train.steps=3", "tokenizer.continuous_steps=1", "tokenizer.num_codes=32", "log.every=1"],
}


def commands_after(marker: str) -> list[list[str]]:
    """The `cogvideo` commands of the first code block behind `marker`, as words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(marker)[1]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].splitlines() if line.startswith("cogvideo ")]


def in_small(words: list[str]) -> list[str]:
    words = ["12" if words[i - 1] == "--count" else word for i, word in enumerate(words)]
    if words[1] != "train":
        return words
    return [*words, *SMALLER["tokenizer" if "tokenizer" in words[3] else "train"]]


@pytest.mark.slow
def test_the_pipeline_runs_as_written(tmp_path: Path) -> None:
    pipeline = commands_after("tested by tests/integration/test_readme.py")
    assert len(pipeline) == 8
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for words in pipeline:
        command = [sys.executable, "-m", "cogvideo", *in_small(words)[1:]]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{shlex.join(words)}: {result.stderr[-2000:]}"
    for made in ("sequential/export/sequential", "interpolation/export/interpolation", "trunk/export/trunk"):
        assert (tmp_path / "runs/tiny" / made / "manifest.json").is_file()
