"""A full disk ends a command in one line that names the file and the disk; nothing half-written is left."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.training import prepare_data

LIMITED = """
import resource, signal, sys
name, size, *words = sys.argv[1:]
from cogvideo.cli.main import main
from cogvideo.training.launch import prepare_environment
prepare_environment()
import torch
resource.setrlimit(getattr(resource, name), (int(size), int(size)))
sys.exit(main(words))
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    prepare_data(folder / "data")
    write_bundle(folder / "bundle", num_layers=1)
    (folder / "captions.jsonl").write_text("".join(f'{{"video": "a.mp4", "caption": "{c}"}}\n' for c in CAPTIONS))
    return folder


def limited(name: str, size: int, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, name, str(size), *words], capture_output=True, text=True, cwd=folder
    )


@pytest.mark.parametrize(
    "command",
    [
        "digits --count 2 --out out",
        "vocabulary --captions {scene}/captions.jsonl --tokenizer {scene}/bundle/image_tokenizer --out out",
        "sample digit --model {scene}/bundle --out out rounds=0",
        "convert --from {scene}/bundle/sequential --to out --to-sat",
        "bundle --text {scene}/bundle/text.model --tokenizer {scene}/bundle/image_tokenizer "
        "--trunk {scene}/bundle/trunk --sequential {scene}/bundle/sequential "
        "--interpolation {scene}/bundle/interpolation --out out",
    ],
)
def test_a_full_disk_is_one_line_that_names_file_and_disk(command: str, scene: Path, tmp_path: Path) -> None:
    done = limited("RLIMIT_FSIZE", 2000, command.format(scene=scene).split(), tmp_path)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert errors[0].startswith("cogvideo: error: ") and "out" in errors[0].split(":")[2], errors
    assert "(the disk at " in errors[0] and "ulimit -f" in errors[0]
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "unfinished" not in path.parts]
    assert not [path for path in left if ".tmp" in path.name or path.name.endswith("lock")], left
