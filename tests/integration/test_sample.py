"""`cogvideo sample` end to end with small random weights: files, repeatability, one line for bad input."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cogvideo.cli.main import main
from cogvideo.files import sha256_file, write_json
from cogvideo.media.video import read_video
from cogvideo.sampling.bundle import HASHED_FILES
from tests.helpers.bundles import CAPTIONS, write_bundle

SMALL = ["rounds=1", "num_clusters=32", "key_frames.top_k_clusters=4"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_bundle(tmp_path_factory.mktemp("weights") / "bundle")
    hashes = {name: sha256_file(folder / name) for name in HASHED_FILES if (folder / name).is_file()}
    write_json(folder / "bundle.json", {"sha256": hashes})
    return folder


def sample(bundle: Path, *words: str) -> int:
    return main(["sample", "--model", str(bundle), *words, *SMALL])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_and_repeats(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("红色的数字3\n\n../../a; touch `x`\n", encoding="utf-8")
    assert sample(bundle, CAPTIONS[0], "seed=7", "--prompts", str(prompts), "--out", str(tmp_path / "a")) == 0
    assert "3 clips of 9 frames, 2 per second" in capsys.readouterr().out
    names = ["000-the-red-digit-3-moves-left-slowly", "001-红色的数字3", "002-a-touch-x"]
    media = {name + ending for name in names for ending in (".mp4", ".gif", ".png")}
    first = contents(tmp_path / "a")
    assert set(first) == media | {"config.yaml", "samples.json", "tokens.safetensors"}
    assert load_file(tmp_path / "a" / "tokens.safetensors")["tokens"].shape == (3, 9, 4)
    assert len(read_video(tmp_path / "a" / f"{names[1]}.mp4")[0]) == 9
    assert b"text_bonus: 0.0" in first["config.yaml"], "the bundle's own settings apply"

    assert sample(bundle, CAPTIONS[0], "seed=7", "--prompts", str(prompts), "--out", str(tmp_path / "b")) == 0
    assert contents(tmp_path / "b") == first, "the same seed gives the same bytes"

    config = str(tmp_path / "a" / "config.yaml")
    assert main(["sample", CAPTIONS[0], "--model", str(bundle), "--config", config, "--out", str(tmp_path / "c")]) == 0
    assert contents(tmp_path / "c")[f"{names[0]}.gif"] == first[f"{names[0]}.gif"], "other prompts change nothing"


def test_dry_run_writes_nothing(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(bundle, "a red one", "--dry-run", "--out", str(tmp_path / "a")) == 0
    assert "1 clip of 9 frames, 2 per second: 36 tokens to draw" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no prompt"),
        ([" "], "the prompt is empty"),
        (["a red one " * 30], "the model reads at most 32; shorten it"),
        (["a", "sed=7"], "did you mean 'seed'?"),
        (["a", "seed=x"], "seed='x' is not valid; expected int"),
        (["a", "--prompts", "none.txt"], "none.txt: No such file"),
        (["a", "--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["a", "--prompts", "binary.txt"], "binary.txt is not UTF-8 text"),
        (["a", "--model", "nowhere"], "no bundle of weights at nowhere"),
        (["a", "--config", "bad.yaml"], "unknown key 'rouns'"),
    ],
)
def test_bad_input(
    bundle: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xfa\xfe\xff")
    (tmp_path / "bad.yaml").write_text("rouns: 1\n")
    assert sample(bundle, *words, "--out", "new") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_output_folders(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert sample(bundle, "a", "--out", str(tmp_path / "file")) == 2
    assert sample(bundle, "a", "--out", str(tmp_path / "file" / "below")) == 2
    assert sample(bundle, "a", "--out", str(tmp_path)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "is not empty" in errors[2]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert sample(bundle, "a", "--out", str(tmp_path), "--overwrite") == 0
    assert (tmp_path / "000-a.mp4").is_file() and (tmp_path / "file").read_text() == "mine"


def test_damaged_weights(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of a bundle, cut short, with a flipped byte, or missing, gives one line and no output."""
    for part in (
        "sequential/model.safetensors",
        "trunk/config.json",
        "image_tokenizer/model.safetensors",
        "text.model",
    ):
        for damage in ("cut", "flip", "gone"):
            broken = tmp_path / "broken"
            shutil.copytree(bundle, broken)
            data = bytearray((broken / part).read_bytes())
            if damage == "gone":
                (broken / part).unlink()
            elif damage == "cut":
                (broken / part).write_bytes(data[: len(data) * 2 // 3])
            else:
                data[len(data) * 2 // 3] ^= 4
                (broken / part).write_bytes(data)
            assert sample(broken, "a", "--out", str(tmp_path / "new")) == 2, (part, damage)
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and error.startswith("cogvideo: error: "), (part, damage, error)
            assert Path(part).name in error, (part, damage, error)
            assert not (tmp_path / "new").exists()
            shutil.rmtree(broken)
