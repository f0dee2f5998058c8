"""The commands of docs/tutorial.md, in page order: rendered and prepared at a small size, all others parsed."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from cogvideo.cli.main import main
from cogvideo.media.video import read_video
from tests.helpers.bundles import write_bundle
from tests.helpers.scripts import ROOT, load_script

pytest.importorskip("vizdoom", reason="the tutorial needs the extra [tutorial]")


def commands() -> dict[str, list[str]]:
    """The words of each `cogvideo` command of the page, by name."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return {words[1]: words[1:] for words in lines if words[0] == "cogvideo"}


def test_the_tutorial_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = load_script("tutorial/render_doom")
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("videos", 3, 0), ("test", 4, 1)):
        render.write_dataset(Path("runs/doom") / name, count, seed)
    assert [path.name for path in Path().iterdir()] == ["runs"], "the engine's files are elsewhere"
    lines = [json.loads(line) for line in Path("runs/doom/videos/captions.jsonl").read_text().splitlines()]
    frames, _ = read_video(Path("runs/doom/videos") / lines[0]["video"])
    assert frames.shape == (33, 120, 120, 3) and np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1
    assert {line["caption"] for line in lines} == set(Path("runs/doom/videos/prompts.txt").read_text().splitlines())

    render.write_dataset(Path("again"), 3, 0)
    for path in Path("again/clips").iterdir():
        assert path.read_bytes() == (Path("runs/doom/videos/clips") / path.name).read_bytes(), "the same clips again"

    shown = commands()
    assert list(shown) == ["prepare", "pretrain", "eval", "demo"]
    assert main([*shown["prepare"], "frames_per_video=2"]) == 0 and Path("runs/doom/look/report.html").is_file()
    assert main([*shown["pretrain"], "--dry-run"]) == 0 and not Path("runs/doom/model").exists()
    write_bundle(Path("runs/doom/model/bundle"))
    Path("short.txt").write_text("a red torch\n")  # the small bundle reads no long prompts
    small = ["--no-distances", "--prompts", "short.txt", "--clips", "2", "seconds=4", "rounds=0", "num_clusters=8"]
    assert main([*shown["eval"], *small]) == 0
    assert json.loads(Path("runs/doom/eval.json").read_text()) and Path("runs/doom/eval.html").is_file()
