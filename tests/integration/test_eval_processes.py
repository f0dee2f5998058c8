"""`cogvideo eval` in two processes: the numbers of one, each clip measured once; and what several cannot do."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideo.cli.main import main
from tests.helpers.ranks import finish, start

CLIPS = 70
"""More than one file of the cache holds."""


def write_frames(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for number in range(CLIPS):
        (folder / f"{number:02d}").mkdir(parents=True)
        for frame in rng.integers(0, 256, (3, 16, 16, 3), np.uint8):
            Image.fromarray(frame).save(folder / f"{number:02d}" / f"{rng.integers(10**9)}.png")
    return folder


def test_two_processes_have_the_numbers_of_one(tmp_path: Path) -> None:
    words = ["eval", "local", "--generated", str(write_frames(tmp_path / "generated", 1)), "--frames", "3"]
    words += ["--side", "16", "--no-distances", "--real", str(write_frames(tmp_path / "real", 0))]
    assert main([*words, "--json", str(tmp_path / "one.json")]) == 0
    more = ["--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "two.json")]
    assert finish(start([*words, *more], 2, tmp_path / "logs")) == [0, 0]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert one == two and one["numbers"]["motion"]["count"] == CLIPS
    assert len(list((tmp_path / "cache").iterdir())) == 4, "two files for each side"


def test_several_processes_need_a_common_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    words = ["eval", "local", "--generated", str(tmp_path)]
    assert main(words) == 2 and main(["eval", "local", "--model", "x", "--prompts", "y", "--cache", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("in several processes give --cache DIR") == 2
