"""A small `cogvideo check`: sound on the digits; a broken cache, tokenizer, training and cut captions are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo.cli.main import main
from cogvideo.data.shards import FORMATS, ROW, VERSION, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.inference.engine import ClipState
from cogvideo.tokenizers.image import ImageTokenizer, open_image_tokenizer
from cogvideo.tokenizers.records import describe_tokenizer
from cogvideo.tokenizers.vqvae import VQVAE
from cogvideo.worlds.digits.files import clips_in_memory

LEARN = ["--clips", "2", "--steps", "60"]
BRIEFLY = ["--clips", "2", "--steps", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prepared clips of moving digits."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    path = BUNDLED_WEIGHTS / "image_tokenizer"
    tokenizer = open_image_tokenizer(path)
    clips = clips_in_memory(tokenizer, 4, clip_seconds=[4.0], num_frames=5)
    rows = np.zeros(4, ROW)
    rows["caption"], rows["seconds"] = np.arange(4), 4.0
    folder.mkdir()
    lines = [json.dumps({"video": "", "text": text}) + "\n" for _, text in clips.texts(range(4))]
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    write_shard(shard_folder(folder, 0), {"rows.npy": rows, "tokens.npy": clips.frames(range(4)).astype(np.uint16)}, [])
    plan = {"format": FORMATS["tokens"], "version": VERSION, "tokenizer": describe_tokenizer(path, tokenizer)}
    write_manifest(folder, plan, [read_shard(shard_folder(folder, 0))])
    return folder


@pytest.fixture(scope="module")
def random_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bundled one's structure, never trained."""
    folder = tmp_path_factory.mktemp("random") / "image_tokenizer"
    config = open_image_tokenizer(BUNDLED_WEIGHTS / "image_tokenizer").config
    torch.manual_seed(0)
    ImageTokenizer(config, VQVAE(config.vqvae)).save(folder)
    return folder


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
    """The exit code, and each check's line by its name."""
    capsys.readouterr()
    code = main(["check", *words])
    lines = capsys.readouterr().out.splitlines()
    return code, {line[8:].partition(":")[0]: line for line in lines if line[:8] in ("ok      ", "BROKEN  ")}


def broken(lines: dict[str, str]) -> list[str]:
    return [name for name, line in lines.items() if line.startswith("BROKEN")]


@pytest.mark.slow
def test_digits_and_the_bundled_weights_are_sound(data: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = check(capsys, "--data", str(data), "--model", str(BUNDLED_WEIGHTS), *LEARN)
    assert (code, broken(lines)) == (0, [])
    assert list(lines) == [
        *("captions", "text tokenizer", "image tokenizer", "training", "cache", "samples"),
        "cache of the bundle's stage 1",
    ]


def test_a_broken_cache_is_named(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    right = ClipState.input_tokens

    def wrong_from_slot_37(state: ClipState, slots: torch.Tensor) -> torch.Tensor:
        return torch.where(slots >= 37, 0, right(state, slots))

    monkeypatch.setattr(ClipState, "input_tokens", wrong_from_slot_37)
    code, lines = check(capsys, "--data", str(data), *LEARN)
    assert (code, broken(lines)) == (1, ["cache", "samples"])
    assert "slot 37 (frame 1, row 2, column 2)" in lines["cache"]
    assert "loss falls but samples are noise, because cached logits differ from uncached at slot 37" in lines["samples"]


def test_training_that_does_not_learn_is_named(data: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = check(capsys, "--data", str(data), *BRIEFLY)
    assert (code, broken(lines)) == (1, ["training"])
    assert "it has not learned its clips" in lines["training"]
    code, lines = check(capsys, "--data", str(data), "--clips", "2", "--minutes", "1e-9")
    assert code == 1 and "in 1 steps" in lines["training"]


def test_captions_that_are_cut_are_named(data: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = check(capsys, "--data", str(data), "--text-len", "8", *BRIEFLY)
    assert code == 1 and "captions" in broken(lines)
    assert "4 of 4 are longer than the model's 8 text tokens" in lines["captions"]


def test_another_image_tokenizer_is_named(data: Path, random_tokenizer: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = check(capsys, "--data", str(data), "--image-tokenizer", str(random_tokenizer), *BRIEFLY)
    assert code == 1 and "did not make the tokens" in lines["image tokenizer"]


def test_videos_are_prepared_and_an_untrained_tokenizer_is_named(
    random_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    videos = tmp_path / "videos"
    assert main(["digits", "--out", str(videos), "--count", "2", "--pixels", "40"]) == 0
    words = ["--captions", str(videos / "captions.jsonl"), *BRIEFLY, "frame_pixels=40"]
    code, lines = check(capsys, *words)
    assert (code, broken(lines)) == (1, ["training"])
    with_model = ["--captions", str(videos / "captions.jsonl"), *BRIEFLY, "--model", str(BUNDLED_WEIGHTS)]
    code, lines = check(capsys, *with_model)
    assert "cache of the bundle's stage 1" in lines and broken(lines) == ["training"]
    assert main(["check", *with_model, "frame_pixels=64"]) == 2
    assert "frame_pixels=64, but" in capsys.readouterr().err
    code, lines = check(capsys, *words, "--image-tokenizer", str(random_tokenizer))
    assert code == 1 and "image tokenizer" in broken(lines) and "one plain colour" in lines["image tokenizer"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --data"),
        (["--data", "x", "--captions", "y"], "give either --data"),
        (["--data", "x", "frame_pixels=40"], "leave them out with --data"),
        (["--data", "x", "--clips", "0"], "--clips 0; expected 1 to 32"),
        (["--data", "x", "--minutes", "0"], "--minutes 0; expected above 0"),
        (["--data", "nowhere"], "is not prepared data"),
        (["--data", "nowhere", "--model", "nowhere"], "nowhere"),
        (["--captions", "nowhere.csv"], "nowhere.csv"),
        (["--captions", "x.csv", "low_res_pixels=8"], "low_res_pixels=8 makes pairs for super-resolution"),
        (["--captions", "x.csv", "crop_pixels=16"], "crop_pixels=16 makes single frames"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert main(["check", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
