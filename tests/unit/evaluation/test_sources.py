"""Clips from folders of videos, folders of frames and results; each says what it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cogvideo.evaluation.measure import ChosenClip, Meter
from cogvideo.evaluation.preprocessing import to_bytes
from cogvideo.evaluation.protocols import LOCAL, Crop, Filter
from cogvideo.evaluation.sources import ReconstructedClip, clips_of_tokens, open_source
from cogvideo.files import write_json
from cogvideo.media.video import DecodedTooLargeError, read_video, write_gif, write_video
from cogvideo.rng import SampleKey
from cogvideo.sampling.outputs import describe_samples, write_tokens
from cogvideo.sampling.pipeline import decode_frames
from cogvideo.tokenizers.image import ImageTokenizer, open_image_tokenizer
from tests.helpers.bundles import write_bundle
from tests.helpers.hostile import png


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ImageTokenizer:
    bundle = write_bundle(tmp_path_factory.mktemp("weights") / "bundle", num_layers=1)
    return open_image_tokenizer(bundle / "image_tokenizer")


def grey(*levels: int):
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 16, 16, 3)).copy()


def test_videos_at_any_depth_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/z.mp4", ".hidden/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / name, grey(10, 60, 110, 160), 4)
    write_gif(tmp_path / "b.gif", grey(10, 60), 4)  # `cogvideo sample` writes both
    (tmp_path / "captions.txt").write_text("no video")
    source = open_source(tmp_path)
    assert source.kind == "videos" and source.lossy
    assert sorted(clip.name for clip in source.clips) == ["a/z.mp4", "b.mp4"]
    clip = source.clips[0]
    assert clip.num_frames == 4 and clip.seconds.tolist() == [0, 0.25, 0.5, 0.75]
    read = clip.read(np.array([1, 3]))
    assert read.shape == (2, 16, 16, 3) and np.abs(read.mean(axis=(1, 2, 3)) - [60, 160]).max() < 4


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for place in ("own/c", "other", "other/hidden/.d"):
        (tmp_path / place).mkdir(parents=True)
        write_video(tmp_path / place / "a.mp4", grey(60, 80), 4)
    for place, target in {
        **{"own/linked": "../other", "own/again": "../other", "own/up": "..", "own/a": "c", "other/loop": "."},
        "other/back": "../own",
    }.items():
        (tmp_path / place).symlink_to(target)
    assert [clip.name for clip in open_source(tmp_path / "own").clips] == ["again/a.mp4", "c/a.mp4"]


def test_folders_of_frames_count_numbers_as_numbers(tmp_path: Path) -> None:
    for clip in ("x", "y"):
        (tmp_path / clip).mkdir()
        for number in (1, 2, 10):
            Image.fromarray(grey(20 * number)[0]).save(tmp_path / clip / f"frame-{number}.png")
    source = open_source(tmp_path)
    assert source.kind == "frames" and not source.lossy and [clip.name for clip in source.clips] == ["x", "y"]
    clip = source.clips[1]
    assert clip.num_frames == 3 and clip.seconds is None
    assert clip.read(np.array([0, 1, 2]))[:, 0, 0, 0].tolist() == [20, 40, 200]
    before = clip.identity
    Image.fromarray(grey(7)[0]).resize((9, 9)).save(tmp_path / "y" / "frame-10.png")
    assert open_source(tmp_path).clips[1].identity != before
    with pytest.raises(ValueError, match=r"9x9 pixels.*one size"):
        clip.read(np.array([0, 2]))
    (tmp_path / "y" / "frame-1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not a readable picture"):
        clip.read(np.array([0]))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tiff"])
def test_pictures_are_decoded_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # not turned: what an evaluation compares is what is stored
    with_alpha = "RGBA" if suffix in (".png", ".webp") else "RGB"
    Image.fromarray(pixels).convert(with_alpha).save(tmp_path / f"0{suffix}", exif=exif)
    with Image.open(tmp_path / f"0{suffix}") as picture:
        expected = np.asarray(picture.convert("RGB"))
    clip = open_source(tmp_path).clips[0]
    monkeypatch.setattr(Image, "open", None)
    assert (clip.read(np.array([0]))[0] == expected).all()


def test_results_are_read_from_tokens_with_their_tokenizer_and_from_mp4_without(
    tmp_path: Path, tokenizer: ImageTokenizer
) -> None:
    tokens = torch.arange(24).reshape(2, 3, 4)
    samples = describe_samples(["000-a", "001-b"], [SampleKey(0, "a", 0), SampleKey(0, "b", 0)])
    write_tokens(tmp_path / "tokens.safetensors", tokens, 2.0, samples)
    write_json(tmp_path / "samples.json", {"samples": samples})
    for name in ("000-a", "001-b", "not-a-sample"):
        write_video(tmp_path / f"{name}.mp4", grey(1, 2, 3), 1)
    exact = open_source(tmp_path, tokenizer)
    assert exact.kind == "tokens" and not exact.lossy
    clip = exact.clips[1]
    assert clip.seconds.tolist() == [0, 1, 2]
    assert (clip.read(np.array([0, 2])) == decode_frames(tokenizer, tokens[1, [0, 2]])).all()
    lossy = open_source(tmp_path)
    assert lossy.lossy and [clip.name for clip in lossy.clips] == ["000-a", "001-b"]


def test_any_number_of_clips_is_read_from_tokens(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    tokens = torch.zeros(1200, 3500, 4, dtype=torch.uint8)  # 16.8 million, more than sampling reads at once
    tokens[-1] = torch.arange(14_000).view(3500, 4).remainder(tokenizer.num_tokens)
    save_file({"tokens": tokens, "seconds": torch.ones(1)}, tmp_path / "tokens.safetensors")
    source = open_source(tmp_path, tokenizer)
    assert len(source) == 1200 and {clip.tokens.dtype for clip in source.clips} == {torch.uint8}, "mapped, not copied"
    clip, indices = source.clips[-1], np.array([1, 3499])
    assert (clip.read(indices) == decode_frames(tokenizer, tokens[-1, indices].long())).all()
    in_memory = clips_of_tokens(tokens[-1:].long(), 1.0, ["x"], tokenizer, "memory")
    assert clip.identity == in_memory.clips[0].identity, "cached features stay valid"


def test_tokens_have_an_identity_of_their_own(tokenizer: ImageTokenizer) -> None:
    tokens = torch.zeros(2, 3, 4, dtype=torch.int64)
    tokens[1, 0, 0] = 1
    source = clips_of_tokens(tokens, None, ["a", "b"], tokenizer, "memory")
    assert source.clips[0].identity != source.clips[1].identity and source.clips[0].seconds is None


def test_a_reconstructed_clip_is_decoded_from_its_own_tokens(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for number in range(3):
        Image.fromarray(grey(90 * number)[0]).save(tmp_path / "x" / f"{number}.png")
    clip = open_source(tmp_path).clips[0]
    copy = ReconstructedClip(clip, tokenizer, lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2).float())
    indices = np.array([0, 2])
    pixels = torch.from_numpy(clip.read(indices)).permute(0, 3, 1, 2).float() / 255
    assert (copy.read(indices) == decode_frames(tokenizer, tokenizer.encode(pixels))).all()
    assert copy.identity != clip.identity and copy.num_frames == 3


@pytest.mark.parametrize("filter", ["bilinear", "lanczos"])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_frames_of_large_clips_are_resized_one_by_one_with_the_same_result(
    tmp_path: Path, tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch, crop: Crop, filter: Filter
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 46, 70, 3), np.uint8)
    (tmp_path / "frames/x").mkdir(parents=True)
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(tmp_path / f"frames/x/{number}.png")
    write_video(tmp_path / "videos/x.mp4", pixels, 4)
    meter, indices = Meter(replace(LOCAL, side=32, crop=crop, filter=filter), {}), np.array([0, 2, 3])
    clips = [open_source(tmp_path / kind).clips[0] for kind in ("frames", "videos")]
    expected = [meter.prepare(clip.read(indices)) for clip in clips]
    monkeypatch.setitem(read_video.__kwdefaults__, "max_bytes", 1)
    with pytest.raises(DecodedTooLargeError):
        clips[1].read(indices)
    for clip, whole in zip(clips, expected, strict=True):
        assert clip.resized(indices, meter.prepare).equal(whole)
        assert (meter.frames(ChosenClip(clip, indices)) == to_bytes(whole)).all()
        copy = ReconstructedClip(clip, tokenizer, meter.prepare)
        assert (copy.read(indices) == decode_frames(tokenizer, tokenizer.encode(whole / 255))).all()


def test_folders_without_clips_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="no videos and no folders of frames"):
        open_source(tmp_path)
    (tmp_path / "x").mkdir()
    Image.fromarray(grey(0)[0]).save(tmp_path / "x" / "0.png")
    write_video(tmp_path / "a.mp4", grey(1, 2), 1)
    with pytest.raises(ValueError, match=r"videos, such as a\.mp4, and folders of frames, such as x"):
        open_source(tmp_path)


def test_damaged_tokens_are_one_line(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    (tmp_path / "tokens.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a safetensors file"):
        open_source(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file"),  # never to Ghostscript
        (png(12_000, 12_000), "12000x12000 pixels; expected at most 134217728"),
    ],
)
def test_hostile_pictures_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "0.png").write_bytes(content)
    clip = open_source(tmp_path).clips[0]
    with pytest.raises(ValueError, match=rf"0\.png is not a readable picture \(.*{problem}"):
        clip.read(np.array([0]))
