"""A full disk ends a command in one line that names the file and the disk; nothing half-written is left."""

from pathlib import Path

import pytest

from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.ranks import finish, start
from tests.helpers.training import prepare_data


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    prepare_data(folder / "data")
    write_bundle(folder / "bundle", num_layers=1)
    (folder / "captions.jsonl").write_text("".join(f'{{"video": "a.mp4", "caption": "{c}"}}\n' for c in CAPTIONS))
    return folder


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
def test_a_full_disk_is_one_line_that_names_file_and_disk(
    command: str, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    codes = finish(start(command.format(scene=scene).split(), 1, tmp_path / "said", max_file_size=2000))
    said = (tmp_path / "said/stderr_0.txt").read_text(encoding="utf-8")
    errors = [line for line in said.splitlines() if "error" in line]
    assert codes == [2] and len(errors) == 1 and "Traceback" not in said, said
    assert errors[0].startswith("cogvideo: error: ") and "out" in errors[0].split(":")[2], errors
    assert "(the disk at " in errors[0] and "ulimit -f" in errors[0]
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "unfinished" not in path.parts]
    assert not [path for path in left if ".tmp" in path.name or path.name.endswith("lock")], left
