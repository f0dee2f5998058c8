"""`cogvideo eval` in two processes: the numbers and clips of one, each measured once; and what several cannot do."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideo.cli.main import main
from cogvideo.sampling.pipeline import Pipeline
from tests.helpers.bundles import write_bundle
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


def test_two_processes_sample_the_clips_of_one_and_an_interrupted_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "bundle", num_layers=1)
    (tmp_path / "prompts.txt").write_text(
        "the red digit 3 moves left slowly\n红色的数字3向左缓慢移动\n", encoding="utf-8"
    )
    words = ["eval", "local", "--model", str(tmp_path / "bundle"), "--prompts", str(tmp_path / "prompts.txt")]
    words += ["--side", "16", "--frames", "5", "--clips", "5", "--no-distances"]
    words += ["clips_at_once=2", "rounds=0", "num_clusters=32", "key_frames.top_k_clusters=4"]

    def drawn(cache: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(cache.glob("generated-*.npz"))}

    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*words, "--cache", str(one), "--json", str(tmp_path / "one.json")]) == 0
    ranks = start([*words, "--cache", str(two), "--json", str(tmp_path / "two.json")], 2, tmp_path / "logs")
    assert finish(ranks) == [0, 0]
    whole = drawn(one)
    assert len(whole) == 3 and drawn(two) == whole, "groups of 2, 2 and 1 clips, byte for byte"
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()

    for name in list(whole)[1:]:
        (two / name).unlink()
    sampled: list[int] = []
    stages = Pipeline.stages

    def spy(self, keys, *rest, **more):
        sampled.append(len(keys))
        return stages(self, keys, *rest, **more)

    monkeypatch.setattr(Pipeline, "stages", spy)
    assert main([*words, "--cache", str(two)]) == 0
    assert drawn(two) == whole and len(sampled) == 2, "the group that was there is not drawn again"


def test_several_processes_need_a_common_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "x").mkdir()
    words = ["eval", "local", "--generated", str(tmp_path)]
    assert main(words) == 2 and main(["eval", "local", "--model", str(tmp_path / "x"), "--prompts", "y"]) == 2
    assert capsys.readouterr().err.count("several processes need --cache DIR") == 2
    assert main(["eval", "digits"]) == 2 and main(["eval", "--self-test"]) == 2
    assert capsys.readouterr().err.count("only protocols with --cache run in several processes") == 2
