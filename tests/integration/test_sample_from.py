"""`cogvideo sample` from given frames, `cogvideo interpolate`, and the interactive mode, on small random weights."""

import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogvideo.cli.main import main
from cogvideo.media.video import read_video, write_video
from cogvideo.sampling.pipeline import Pipeline
from tests.helpers.bundles import CAPTIONS, write_bundle

SMALL = {"sample": ["num_clusters=32", "key_frames.top_k_clusters=4"], "interpolate": ["num_clusters=32"]}
CAPTION = CAPTIONS[0]
SIDE = 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 9 frames, 2 per second, and pictures of its first four."""
    folder = tmp_path_factory.mktemp("given")
    frames = np.random.default_rng(0).integers(0, 255, size=(9, SIDE, SIDE, 3), dtype=np.uint8)
    write_video(folder / "clip.mp4", frames, 2, crf=0, pixel_format="yuv444p")
    for index, frame in enumerate(read_video(folder / "clip.mp4", side=SIDE)[0][:4]):
        Image.fromarray(frame).save(folder / f"{index}.png")
    return folder


def run(bundle: Path, command: str, *words: str | Path) -> int:
    return main([command, "--model", str(bundle), *map(str, words), *SMALL[command]])


def tokens(out: Path) -> torch.Tensor:
    return load_file(out / "tokens.safetensors")["tokens"]


def test_image_to_video(bundle: Path, given: Path, tmp_path: Path) -> None:
    """From a picture, from a video's first frame and from saved tokens: the same frame, so the same clip."""
    first = given / "0.png"
    assert run(bundle, "sample", CAPTION, "a", "--first-frame", first, "--out", tmp_path / "a", "rounds=1") == 0
    made = tokens(tmp_path / "a")
    assert made.shape == (2, 9, 4) and torch.equal(made[0, 0], made[1, 0]) and (made[0] != made[1]).any()
    clip = given / "clip.mp4"
    assert run(bundle, "sample", CAPTION, "a", "--first-frame", clip, "--out", tmp_path / "b", "rounds=1") == 0
    saved = tmp_path / "a" / "tokens.safetensors"
    assert run(bundle, "sample", "--first-frame", saved, "--out", tmp_path / "c", "rounds=1") == 0
    assert torch.equal(tokens(tmp_path / "b"), made) and torch.equal(tokens(tmp_path / "c"), made)


def test_a_video_is_continued(bundle: Path, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result includes the video, and can be continued itself."""
    clip, a, b = given / "clip.mp4", tmp_path / "a", tmp_path / "b"
    assert run(bundle, "sample", CAPTION, "--continue", clip, "--out", a, "rounds=1") == 0
    assert "1 clip of 17 frames, 2 per second" in capsys.readouterr().out
    assert run(bundle, "interpolate", clip, "--caption", "x", "--out", tmp_path / "all", "rounds=1") == 0
    made = tokens(a)
    assert made.shape == (1, 17, 4) and torch.equal(made[:, :9], tokens(tmp_path / "all")[:, ::2])
    assert len(read_video(next(a.glob("*.mp4")))[0]) == 17

    assert run(bundle, "sample", "--continue", a, "--out", b, "rounds=1") == 0, "the caption is known"
    assert tokens(b).shape == (1, 25, 4) and torch.equal(tokens(b)[:, :17], made)
    assert load_file(b / "tokens.safetensors")["seconds"].item() == 12.0
    assert json.loads((b / "samples.json").read_text())["samples"][0]["prompt"] == CAPTION


def test_rounds_can_be_run_later(bundle: Path, tmp_path: Path) -> None:
    """Key frames interpolated by the other command are the clip that one command makes."""
    whole, keys, once, twice = (tmp_path / name for name in ("whole", "keys", "once", "twice"))
    words = [CAPTION, "b", "samples_per_prompt=2", "seed=3"]
    assert run(bundle, "sample", *words, "rounds=2", "--out", whole) == 0
    assert run(bundle, "sample", *words, "rounds=0", "--out", keys) == 0
    assert run(bundle, "interpolate", keys, "seed=3", "rounds=1", "--out", once) == 0
    assert run(bundle, "interpolate", once / "tokens.safetensors", "seed=3", "rounds=1", "--out", twice) == 0
    assert torch.equal(tokens(twice), tokens(whole))
    for path in whole.glob("*.mp4"):
        assert (twice / path.name).read_bytes() == path.read_bytes()


def test_pictures_in_a_row(bundle: Path, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [given / f"{index}.png" for index in range(4)]
    words = ["--caption", CAPTION, "seconds=3", "rounds=2"]
    assert run(bundle, "interpolate", *pictures, *words, "--out", tmp_path / "a") == 0
    assert "1 clip of 13 frames, 4 per second" in capsys.readouterr().out
    assert run(bundle, "interpolate", *pictures[:2], *words, "--out", tmp_path / "b", "--dry-run") == 0
    # a pair fills one of the model's clips, then 3 frames do: two frames are drawn in each, whatever is kept
    assert "1 clip of 5 frames, 1.33333 per second: 16 tokens to draw" in capsys.readouterr().out
    assert not (tmp_path / "b").exists()
    assert run(bundle, "interpolate", *pictures[:2], *words, "--out", tmp_path / "b") == 0
    assert torch.equal(tokens(tmp_path / "b")[0, [0, -1]], tokens(tmp_path / "a")[0, [0, 4]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("interpolate", "there is nothing to interpolate; give a video, saved tokens, or pictures"),
        ("interpolate {given}/none.mp4 --caption a", "none.mp4 is not a file; expected a video or picture"),
        ("interpolate {given}/broken.mp4 --caption a", "broken.mp4 is not a readable video"),
        ("interpolate {given} --caption a", "tokens.safetensors"),
        ("interpolate {given}/clip.mp4", "the input has no caption; pass --caption"),
        ("interpolate {given}/clip.mp4 --caption a rounds=0", "rounds=0 adds no frames"),
        ("interpolate {given}/clip.mp4 --caption a --fps 3", "has about 2 frames per second, fewer than the 3"),
        ("interpolate {given}/clip.mp4 --caption a --fps x", "argument --fps: invalid float value: 'x'"),
        (
            "interpolate {given}/clip.mp4 --caption a seconds=2",
            "seconds= is for pictures; this input has its own length",
        ),
        ("interpolate {given}/clip.mp4 --caption " + "a" * 90, "the model reads at most 32; shorten it"),
        ("interpolate {given}/clip.mp4 --caption ''", "the caption is empty"),
        ("interpolate {given}/0.png --caption a", "interpolation needs at least 2 frames, got 1"),
        ("interpolate {given}/0.png {given}/clip.mp4 --caption a", "clip.mp4 is a video of 9 frames"),
        ("sample a --first-frame {given}/none.png", "none.png is not a file; expected a video or picture"),
        ("sample a --first-frame {given}/broken.mp4", "broken.mp4 is not a readable video"),
        ("sample --first-frame {given}/0.png", "there is no prompt"),
        ("sample a --continue {given}/clip.mp4 rounds=3", "fewer than the 8 needed"),
        ("sample a --continue {given}/clip.mp4 --first-frame {given}/0.png", "not allowed with argument"),
        ("sample a given_frames=2", "given_frames=2 has an effect on `cogvideo sample --continue` only"),
        ("sample a --first-frame {given}/0.png given_frames=2", "given_frames=2 has an effect on"),
        ("interpolate {given}/clip.mp4 --caption a given_frames=2", "given_frames=2 has an effect on"),
        (
            "sample a --first-frame {given}/0.png first_frame.temperature=2",
            "has an effect on first frames that are drawn",
        ),
        (
            "sample a --continue {given}/clip.mp4 style=oil",
            "style=oil has an effect on first frames that are drawn only",
        ),
        (
            "sample --continue {given}/clip.mp4 samples_per_prompt=2",
            "samples_per_prompt=2 has an effect on prompts only",
        ),
        ("interpolate {given}/clip.mp4 samples_per_prompt=2", "samples_per_prompt=2 has an effect on prompts only"),
        ("interpolate {given}/clip.mp4 key_frames.temperature=2", "has an effect on `cogvideo sample` only"),
        ("sample a --adapters-apart", "--adapters-apart goes with --adapter"),
        ("sample a --resume --overwrite", "--overwrite: not allowed with argument --resume"),
        ("sample a --interactive", "reads prompts from standard input; leave out a prompt"),
        ("sample --interactive --resume", "leave out --resume"),
        ("sample a style=cubist", "style='cubist' is not valid; expected one of none, mainbody"),
    ],
)
def test_bad_input(
    bundle: Path,
    given: Path,
    tmp_path: Path,
    words: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (given / "broken.mp4").write_text("no video")
    monkeypatch.chdir(tmp_path)
    assert run(bundle, *shlex.split(words.format(given=given)), "--out", "new") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_an_input_is_not_replaced_by_its_results(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    assert run(bundle, "sample", "a", "--out", out, "rounds=0") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    video = next(out.glob("*.mp4"))
    link = out / f"100-{video.name}"
    link.symlink_to(shutil.copy(video, tmp_path / "clip.mp4"))
    for given in (out, out / "tokens.safetensors", video, link):
        for words in (["interpolate", given, "--overwrite"], ["sample", "b", "--continue", given, "--resume"]):
            assert run(bundle, *words, "--out", out) == 2
            error = f"{given} would be replaced by the results in --out {out}; choose another --out"
            assert error in capsys.readouterr().err
    link.unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_more_clips_than_prompts(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, "sample", "a", "b", "--out", tmp_path / "a", "rounds=0") == 0
    assert run(bundle, "sample", *"abc", "--continue", tmp_path / "a", "--out", tmp_path / "b", "rounds=0") == 2
    assert "the given file holds 2 clips, but 3 are requested" in capsys.readouterr().err


ERRORS = ["not UTF-8", "shorten it", "did you mean 'seed'", "weights= cannot change", "given_frames=2 has an effect on"]


def test_interactive(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each prompt a folder, the same as by a command of its own; a bad line is one line, and the next is read."""
    lines = [CAPTION, "", "a " * 90, "sed=3", "weights=int8", "given_frames=2", CAPTION, "seed=4 rounds=0", "数字"]
    data = b"\n".join([lines[0].encode(), b"\xff", *(line.encode() for line in lines[1:])])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(bundle, "sample", "--interactive", "rounds=1", "--out", tmp_path / "talk") == 0
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert all(message in line for message, line in zip(ERRORS, errors, strict=True))
    names = ["000-the-red-digit-3-moves-left-slowly", "001-the-red-digit-3-moves-left-slowly", "002-数字"]
    assert sorted(os.listdir(tmp_path / "talk")) == names
    assert run(bundle, "sample", CAPTION, CAPTION, "rounds=1", "--out", tmp_path / "both") == 0
    again = torch.cat([tokens(tmp_path / "talk" / name) for name in names[:2]])
    assert torch.equal(tokens(tmp_path / "both"), again), "a repeated prompt is another sample of it"
    assert run(bundle, "sample", "数字", "seed=4", "rounds=0", "--out", tmp_path / "one") == 0
    assert torch.equal(tokens(tmp_path / "one"), tokens(tmp_path / "talk" / names[2]))


def test_a_refused_prompt_is_no_sample(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, refused = Pipeline.encode_prompts, []

    def refuse_once(*words: object) -> object:
        if not refused:
            refused.append(words)
            raise ValueError("not now")
        return encode(*words)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{CAPTION}\n{CAPTION}\n".encode())))
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "encode_prompts", refuse_once)
        assert run(bundle, "sample", "--interactive", "rounds=0", "--out", tmp_path / "talk") == 0
    assert run(bundle, "sample", CAPTION, "rounds=0", "--out", tmp_path / "one") == 0
    (made,) = (tmp_path / "talk").glob("*/tokens.safetensors")
    assert torch.equal(tokens(tmp_path / "one"), tokens(made.parent))
