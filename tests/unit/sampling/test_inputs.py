"""Pictures, videos and saved tokens as clips, and files that are none of these."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cogvideo.media.video import write_video
from cogvideo.sampling import inputs
from cogvideo.sampling.inputs import InputReader, _times_at_rate
from cogvideo.sampling.outputs import write_tokens
from tests.helpers import pipelines

READER = InputReader(pipelines.image_tokenizer(), frame_side=2)
SIDE = 16
FRAMES = np.random.default_rng(0).integers(0, 255, size=(9, 1, 1, 3), dtype=np.uint8) * np.ones(
    (1, SIDE, SIDE, 1), np.uint8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inputs")
    write_video(made / "clip.mp4", FRAMES, 4, crf=0, pixel_format="yuv444p")
    for index in range(3):
        wide = np.repeat(FRAMES[index], 2, axis=1)
        wide[:, :8] = wide[:, -8:] = 0  # outside the centre square
        Image.fromarray(wide).save(made / f"{index}.png")
    about = [{"name": "x", "prompt": "a cat", "number": 2}, {"name": "y", "prompt": "b", "number": 0}]
    write_tokens(made / "tokens.safetensors", torch.arange(2 * 9 * 4).view(2, 9, 4) % 48, 2.0, about)
    return made


def encoded(*frames: int) -> torch.Tensor:
    pixels = torch.from_numpy(FRAMES[list(frames)]).permute(0, 3, 1, 2).float() / 255
    return READER.tokenizer.encode(pixels)[None]


def test_a_video(folder: Path) -> None:
    whole = READER.read([folder / "clip.mp4"])
    assert whole.tokens.shape == (1, 9, 4) and whole.seconds == pytest.approx(2.0) and whole.samples == ()
    two_per_second = READER.read([folder / "clip.mp4"], fps=2.0)
    assert torch.equal(two_per_second.tokens, whole.tokens[:, ::2]) and two_per_second.seconds == 2.0
    assert torch.equal(READER.read_first_frame(folder / "clip.mp4").tokens, whole.tokens[:, :1])


def test_pictures_are_cut_to_the_centre_square(folder: Path) -> None:
    row = READER.read([folder / f"{index}.png" for index in (2, 0)])
    assert row.seconds is None and torch.equal(row.tokens, encoded(2, 0))
    assert torch.equal(READER.read_first_frame(folder / "1.png").tokens, encoded(1))


def test_the_length_of_saved_tokens_is_the_one_that_was_sampled(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens.safetensors", ZEROS, 0.64, [{"prompt": "a", "number": 0}])
    assert READER.read([tmp_path]).seconds == 0.64


def test_saved_tokens(folder: Path) -> None:
    for path in (folder, folder / "tokens.safetensors"):
        found = READER.read([path])
        assert found.tokens.shape == (2, 9, 4) and found.tokens[1, 8, 3] == 71 % 48
        assert found.seconds == 2.0 and found.samples == (("a cat", 2), ("b", 0))
    assert torch.equal(READER.read_first_frame(folder).tokens, found.tokens[:, :1])


def test_to_continue(folder: Path) -> None:
    last = READER.read_to_continue(folder / "clip.mp4", 4 / 3)
    whole = READER.read([folder / "clip.mp4"]).tokens
    assert torch.equal(last.tokens, whole[:, [2, 5, 8]]), "counted back from the last frame"
    assert READER.read_to_continue(folder, 4.0).num_frames == 9
    assert READER.read_to_continue(folder / "1.png", 8.0).num_frames == 1
    with pytest.raises(ValueError, match="has 4 frames per second, but these settings generate 8; change seconds="):
        READER.read_to_continue(folder, 8.0)


def test_frames_at_a_rate() -> None:
    uneven = np.array([0.0, 0.26, 0.49, 0.6, 0.76, 1.0])
    assert _times_at_rate(Path("x"), uneven, 4.0, from_end=False).tolist() == [0.0, 0.26, 0.49, 0.76, 1.0]
    assert _times_at_rate(Path("x"), uneven, 3.0, from_end=True).tolist() == [0.0, 0.26, 0.6, 1.0]
    few = "x has about 5 frames per second, fewer than the"
    for fps, message in ((1e25, few), (8.0, f"{few} 8"), (0.0, "--fps 0 is not a frame rate")):
        with pytest.raises(ValueError, match=message):
            _times_at_rate(Path("x"), uneven, fps, from_end=True)
    with pytest.raises(ValueError, match="--fps nan is not a frame rate"):
        _times_at_rate(Path("x"), uneven, float("nan"), from_end=True)


def test_refused(folder: Path, tmp_path: Path) -> None:
    clip, picture, tokens = folder / "clip.mp4", folder / "0.png", folder / "tokens.safetensors"
    for paths, fps, message in (
        ([clip, picture], None, "clip.mp4 is a video of 9 frames; give one video, or pictures only"),
        ([picture, picture], 2.0, "--fps needs a video; for pictures set seconds="),
        ([tokens], 2.0, "leave out --fps"),
        ([clip], 16.0, "fewer than the 16 needed"),
        ([tokens, picture], None, "tokens.safetensors is not a readable video"),
    ):
        with pytest.raises(ValueError, match=message):
            READER.read(paths, fps)
    for path in (tmp_path / "none.png", tmp_path / "a.safetensors", tmp_path):
        with pytest.raises((ValueError, OSError), match=path.name):
            READER.read([path])


ZEROS, ONE = torch.zeros(1, 3, 4).int(), torch.ones(1)


@pytest.mark.parametrize(
    ("tokens", "seconds", "about", "message"),
    [
        (ZEROS, None, None, "does not hold tokens of clips"),
        (ZEROS.float(), ONE, None, "expected a three-dimensional integer tensor"),
        (ZEROS[0], ONE, None, "expected a three-dimensional integer tensor"),
        (ZEROS.to(torch.uint16), ONE, None, "does not hold tokens of clips .* has dtype 'U16'"),
        (ZEROS[:0], ONE, None, "expected a three-dimensional integer tensor"),
        (ZEROS, torch.ones(2), None, "expected a three-dimensional integer tensor"),
        (torch.zeros(1, 3, 9).int(), ONE, None, "frames of 9 tokens with ids up to 0"),
        (ZEROS + 48, ONE, None, "up to 48; these weights make 4 tokens with ids below 48"),
        (ZEROS - 1, ONE, None, "use the weights that generated it"),
        (ZEROS, 0 * ONE, None, "seconds=0.0; expected the length"),
        (ZEROS, torch.nan * ONE, None, "seconds=nan"),
        (ZEROS, ONE, "[1", "its header does not list the captions of its 1 clips"),
        (ZEROS, ONE, "[]", "its header does not list the captions of its 1 clips"),
        (ZEROS, ONE, '[{"prompt": 1, "number": 0}]', "its header does not list the captions of its 1 clips"),
    ],
)
def test_bad_tokens(
    tmp_path: Path, tokens: torch.Tensor, seconds: torch.Tensor | None, about: str | None, message: str
) -> None:
    path = tmp_path / "tokens.safetensors"
    tensors = {"tokens": tokens.contiguous(), **({} if seconds is None else {"seconds": seconds})}
    save_file(tensors, path, metadata=None if about is None else {"samples": about})
    for read in (lambda: READER.read([path]), lambda: READER.map_tokens(path)):
        with pytest.raises(ValueError, match=message):
            read()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="does not hold tokens"):
        READER.read([path])


def test_saved_tokens_are_counted_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens.safetensors"
    write_tokens(path, torch.zeros(2, 9, 4, dtype=torch.int64), 2.0, [{"prompt": "a", "number": n} for n in (0, 1)])
    few = replace(READER, max_tokens=8)
    assert few.read_first_frame(path).tokens.shape == (2, 1, 4), "only first frames count"
    assert replace(READER, max_tokens=36).map_tokens(tmp_path).tokens.shape == (2, 9, 4), "clips count one by one"
    monkeypatch.setattr(inputs, "safe_open", None)
    with pytest.raises(ValueError, match=r"tokens\.safetensors holds 72 tokens; expected at most 71"):
        replace(READER, max_tokens=71).read([path])
    with pytest.raises(ValueError, match=r"tokens\.safetensors holds clips of 36 tokens; expected at most 35"):
        replace(READER, max_tokens=35).map_tokens(path)
    monkeypatch.setattr(inputs, "MAX_CLIPS", 1)
    with pytest.raises(ValueError, match=r"tokens\.safetensors holds 2 clips; expected at most 1"):
        READER.map_tokens(path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_mapped_tokens_keep_their_type_and_are_checked_to_the_last(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "tokens.safetensors"
    tokens = torch.arange(2 * 9 * 4).view(2, 9, 4).remainder(48).to(dtype)
    save_file({"tokens": tokens, "seconds": ONE}, path)
    mapped = READER.map_tokens(path)
    assert mapped.tokens.dtype == dtype and mapped.tokens.equal(tokens) and mapped.seconds == 1
    tokens[-1, -1, -1] = 48
    save_file({"tokens": tokens, "seconds": ONE}, path)
    with pytest.raises(ValueError, match="ids up to 48; these weights make 4 tokens with ids below 48"):
        READER.map_tokens(path)
