"""`cogvideo digits` and `cogvideo prepare` end to end, with a tiny untrained image tokenizer."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from cogvideo.cli.main import main
from cogvideo.data.dataset import ClipDataset, FrameDataset
from cogvideo.data.encode import TokenEncoder
from cogvideo.data.prepare import Preparation, PrepareConfig
from cogvideo.data.shards import read_manifest
from cogvideo.media.video import read_video, write_video
from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from cogvideo.tokenizers.vqvae import VQVAEConfig

CLIPS = ["frame_pixels=40", "clips.policy=all", "clips.clip_seconds=[4,2,1,0.5]", "clips.max_clips_per_length=2"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    network = VQVAEConfig(
        channels=4,
        encoder_num_res_blocks=1,
        z_channels=8,
        embedding_dim=8,
        num_codes=64,
        levels=(1,),
        norm_groups=2,
        mid_attention=False,
        attention_resolutions=(),
    )
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    ImageTokenizer(ImageTokenizerConfig(network)).save(folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "train"
    assert main(["digits", "--out", str(folder), "--count", "6", "--seed", "4"]) == 0
    return folder / "captions.jsonl"


def prepare(captions, out, *words):
    return main(["prepare", "--captions", str(captions), "--out", str(out), *map(str, words)])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, digits, tokenizer):
    out = tmp_path_factory.mktemp("prepared") / "clips"
    assert prepare(digits, out, "--tokenizer", tokenizer, *CLIPS, "videos_per_shard=2") == 0
    return out


def test_rows_are_the_tokens_of_the_videos_frames(prepared, digits, tokenizer):
    clips = ClipDataset(prepared)
    clips.verify()
    assert len(clips) == 6 * 7 and clips.num_frames == 5 and clips.frame_len == 25 and clips.num_tokens == 64
    captions = [json.loads(line) for line in digits.read_text(encoding="utf-8").splitlines()]
    assert read_manifest(prepared, "tokens")["rows_by_seconds"] == {"0.5": 12, "1": 12, "2": 12, "4": 6}
    encoder = ImageTokenizer.load(tokenizer)
    frames, _ = read_video(digits.parent / captions[2]["video"])
    pixels = rearrange(torch.from_numpy(frames), "n h w c -> n c h w") / 255
    tokens = encoder.encode(pixels).numpy()
    assert len(np.unique(tokens)) > 3
    rows = [clips.row(i) for i in range(14, 21)]
    assert [seconds for _, seconds, _ in rows] == [4, 2, 2, 1, 1, 0.5, 0.5]
    assert {caption for *_, caption in rows} == {captions[2]["caption"]}
    for (found, _, _), first, step in zip(rows, (0, 0, 16, 0, 24, 0, 28), (8, 4, 4, 2, 2, 1, 1), strict=True):
        assert (found == tokens[first : first + 4 * step + 1 : step]).mean() > 0.99  # batches differ in rounding


def test_each_frame_is_encoded_once(digits, tmp_path, tokenizer):
    batch_sizes = []
    encode = TokenEncoder(ImageTokenizer.load(tokenizer))

    def counting(frames):
        batch_sizes.append(len(frames))
        return encode(frames)

    config = PrepareConfig(frame_pixels=40, encode_batch=50)
    manifest = Preparation(digits, tmp_path / "out", "tokens", config).run(counting)
    assert manifest["rows"] == 6 and sum(batch_sizes) == 6 * 5 and max(batch_sizes) <= 50


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(prepared, digits, tokenizer, tmp_path):
    out = tmp_path / "clips"
    words = ["--tokenizer", str(tokenizer), *CLIPS, "videos_per_shard=2"]
    command = [sys.executable, "-m", "cogvideo", "prepare", "--captions", str(digits), "--out", str(out), *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    start = time.monotonic()
    while not (out / "shards" / "00000").is_dir() and process.poll() is None and time.monotonic() - start < 120:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / "shards" / ".00002.abc.tmp").mkdir()  # left by a kill while writing the next shard
    (out / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="not finished"):
        ClipDataset(out)
    first = (out / "shards" / "00000" / "tokens.npy").stat().st_mtime_ns
    assert prepare(digits, out, *words) == 0
    assert (out / "shards" / "00000" / "tokens.npy").stat().st_mtime_ns == first
    assert contents(out) == contents(prepared)


def test_a_folder_with_other_content_is_not_touched(prepared, digits, tokenizer, tmp_path, capsys):
    before = contents(prepared)
    assert prepare(digits, prepared, "--tokenizer", tokenizer, *CLIPS, "clips.num_frames=3") == 2
    assert "begun with other config" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("keep")
    assert prepare(digits, tmp_path, "--tokenizer", tokenizer) == 2
    assert "holds other files" in capsys.readouterr().err
    assert contents(prepared) == before and list(contents(tmp_path)) == ["mine.txt"]


@pytest.fixture
def mixed(tmp_path, digits):
    """Two good videos, one of them with two captions; one truncated, one missing, one not a video; one short span."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = [(digits.parent / f"clips/00000{index}.mp4").read_bytes() for index in range(2)]
    for name, data in {"a": good[0], "b": good[1], "cut": good[0][:2000], "text": b"hello"}.items():
        (folder / f"{name}.mp4").write_bytes(data)
    lines = [
        {"video": "a.mp4", "caption": "first"},
        {"video": "cut.mp4", "caption": "cut"},
        {"video": "none.mp4", "caption": "none"},
        {"video": "b.mp4", "caption": "later", "start": 2.0, "end": 4.0},
        {"video": "text.mp4", "caption": "text"},
        {"video": "b.mp4", "caption": "short", "start": 1.0, "end": 1.2},
        {"video": "a.mp4", "caption": "second"},
    ]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "c.jsonl"


def test_bad_videos_are_skipped_and_reported(mixed, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(mixed, out, "--tokenizer", tokenizer, "frame_pixels=40") == 0
    clips = ClipDataset(out)
    found = [(seconds, caption) for _, seconds, caption in (clips.row(i) for i in range(len(clips)))]
    assert found == [(4.0, "first"), (4.0, "second"), (2.0, "later")]
    assert (clips.row(0)[0] == clips.row(1)[0]).all()
    entries = [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert read_manifest(out, "tokens")["skipped"] == len(entries) == 4
    skipped = {entry["video"]: entry["reason"] for entry in entries}
    assert set(skipped) == {"cut.mp4", "none.mp4", "text.mp4", "b.mp4"}
    assert "cut short" in skipped["cut.mp4"] and "no clip fits" in skipped["b.mp4"]
    assert not any(str(tmp_path) in reason for reason in skipped.values())
    assert "4 of 7 captions skipped" in capsys.readouterr().err


def test_a_link_out_of_the_folder_is_not_followed(mixed, digits, tmp_path):
    (mixed.parent / "link.mp4").symlink_to(digits.parent / "clips/000000.mp4")
    lines = [{"video": "link.mp4", "caption": "elsewhere"}, {"video": "a.mp4", "caption": "here"}]
    mixed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prepare(mixed, tmp_path / "out", "--frames", "frame_pixels=40", "frames_per_video=1") == 0
    assert len(FrameDataset(tmp_path / "out")) == 1
    assert "link.mp4 is a link that leads out" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_strict_makes_a_bad_video_an_error(mixed, tokenizer, tmp_path, capsys):
    assert prepare(mixed, tmp_path / "out", "--tokenizer", tokenizer, "frame_pixels=40", "strict=true") == 2
    assert "cut.mp4 is cut short" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists(), "the command can run again once the video is repaired"


def test_another_limit_tries_again_what_a_begun_folder_skipped(tmp_path, capsys):
    """Eight frames of 256x256 pixels take 1.5 MiB, two less than 1."""
    for name, count in (("a", 8), ("b", 2)):
        write_video(tmp_path / f"{name}.mp4", np.zeros((count, 256, 256, 3), np.uint8), 8)
    lines = [json.dumps({"video": f"{name}.mp4", "caption": name}) for name in "ab"]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    out, words = tmp_path / "out", ["--frames", "frame_pixels=256", "videos_per_shard=1"]
    assert prepare(tmp_path / "c.jsonl", out, *words, "max_video_mib=1") == 0
    reason = "a.mp4 has 8 frames that clips need, more than max_video_mib=1 holds; raise it"
    assert reason in capsys.readouterr().err and len(FrameDataset(out)) == 2
    kept = (out / "shards/00001").stat().st_ino
    assert prepare(tmp_path / "c.jsonl", out, *words) == 0
    assert len(FrameDataset(out)) == 10 and (out / "skipped.jsonl").read_text() == ""
    assert (out / "shards/00001").stat().st_ino == kept, "what skipped nothing is not made again"


FRAMES = ["--frames", "frame_pixels=16", "frames_per_video=2"]


@pytest.fixture
def videos(tmp_path):
    """Four videos, black to light grey, in a folder, and the captions of these."""
    (tmp_path / "videos").mkdir()
    for index, name in enumerate("abcd"):
        write_video(tmp_path / f"videos/{name}.mp4", np.full((5, 16 + 16 * index, 16, 3), 60 * index, np.uint8), 8)
    lines = [json.dumps({"video": f"{name}.mp4", "caption": name}) + "\n" for name in "abcd"]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    return tmp_path / "videos"


def prepare_frames(videos, out, *words):
    return prepare(videos.parent / "c.jsonl", out, "--videos", videos, *FRAMES, *words)


def without_sizes(out):
    """Make a folder as the previous version did."""
    for path in (out / "shards").rglob("shard.json"):
        info = json.loads(path.read_text())
        del info["video_bytes"]
        path.write_text(json.dumps(info))


@pytest.mark.parametrize(("version", "per_shard"), [("this", 4), ("previous", 4), ("this", 2)])
def test_finished_rows_are_kept_when_their_videos_are_gone(videos, tmp_path, capsys, per_shard, version):
    """Six frames of 256x256 pixels take 1.1 MiB; the other videos have five."""
    write_video(videos / "d.mp4", np.zeros((6, 16, 16, 3), np.uint8), 8)
    out, words = tmp_path / "out", [f"videos_per_shard={per_shard}", "frame_pixels=256", "frames_per_video=6"]
    assert prepare_frames(videos, out, *words, "max_video_mib=1") == 0
    assert "1 of 4 captions skipped" in capsys.readouterr().err
    if version == "previous":
        without_sizes(out)
    before = contents(out)
    videos.rename(tmp_path / "unmounted")
    assert prepare_frames(videos, out, *words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    first = "a" if per_shard == 4 else "c"
    assert f"{out} holds rows of {first}.mp4, which is no longer a file in {videos}; put the videos back" in last
    assert contents(out) == before
    (tmp_path / "unmounted").rename(videos)
    assert prepare_frames(videos, out, *words) == 0
    assert len(FrameDataset(out)) == 3 * 5 + 6


def test_a_run_without_rows_removes_only_what_it_began(videos, tmp_path, capsys):
    videos.rename(tmp_path / "unmounted")
    out = tmp_path / "out"
    assert prepare_frames(videos, out) == 2
    assert "none of the 4 videos yielded a row; the first reason: a.mp4 is not a file" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "unmounted").rename(videos)
    assert prepare_frames(videos, out) == 0
    (out / "manifest.json").unlink()
    shard = json.loads((out / "shards/00000/shard.json").read_text())
    np.save(out / "shards/00000/rows.npy", np.load(out / "shards/00000/rows.npy")[:0])
    size = (out / "shards/00000/rows.npy").stat().st_size
    shard |= {"rows": 0, "files": shard["files"] | {"rows.npy": {"bytes": size, "sha256": ""}}}
    (out / "shards/00000/shard.json").write_text(json.dumps(shard))
    before = contents(out)
    assert prepare_frames(videos, out) == 2
    assert "none of the 4 videos yielded a row" in capsys.readouterr().err and contents(out) == before


@pytest.mark.parametrize("per_shard", [1, 4])
def test_videos_that_were_missing_are_used_once_they_are_there(videos, tmp_path, per_shard):
    out, words = tmp_path / "out", [f"videos_per_shard={per_shard}"]
    assert prepare_frames(videos, tmp_path / "whole", *words) == 0
    (tmp_path / "later").mkdir()
    for name in ("c", "d"):
        (videos / f"{name}.mp4").rename(tmp_path / f"later/{name}.mp4")
    assert prepare_frames(videos, out, *words) == 0
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["video"], entry["missing"]) for entry in skipped] == [("c.mp4", True), ("d.mp4", True)]
    kept = (out / "shards/00000").stat().st_ino
    assert prepare_frames(videos, out, *words) == 0 and (out / "shards/00000").stat().st_ino == kept
    for name in ("c", "d"):
        (tmp_path / f"later/{name}.mp4").rename(videos / f"{name}.mp4")
    assert prepare_frames(videos, out, *words) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert ((out / "shards/00000").stat().st_ino == kept) == (per_shard == 1)


def test_other_videos_under_the_same_names_are_refused(videos, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare_frames(videos, out) == 0
    before, size = contents(out), (videos / "b.mp4").stat().st_size
    write_video(videos / "b.mp4", np.full((9, 16, 16, 3), 200, np.uint8), 8)
    now = (videos / "b.mp4").stat().st_size
    assert prepare_frames(videos, out) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{out} was begun with another b.mp4, of {size} bytes instead of {now}; give the videos" in last
    assert contents(out) == before
    videos.rename(tmp_path / "unmounted")
    assert prepare_frames(videos, out) == 0, "a finished folder needs no videos"
    (tmp_path / "unmounted").rename(videos)
    without_sizes(out)
    assert prepare_frames(videos, out) == 0, "folders of the previous version can be finished"


def test_a_skipped_video_that_has_changed_is_tried_again(videos, tmp_path):
    out, data = tmp_path / "out", (videos / "b.mp4").read_bytes()
    (videos / "b.mp4").write_bytes(data[:100])
    assert prepare_frames(videos, out) == 0 and len(FrameDataset(out)) == 6
    (videos / "b.mp4").write_bytes(data)
    assert prepare_frames(videos, out) == 0 and len(FrameDataset(out)) == 8


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_failing_machine_skips_no_video(digits, tmp_path, monkeypatch, error):
    def fail_once(path, **options):
        if Path(path).name == "000003.mp4":
            raise error
        return read_video(path, **options)

    monkeypatch.setattr("cogvideo.data.extract.read_video", fail_once)
    assert prepare(digits, tmp_path / "out", "--frames", "frame_pixels=40") == 2
    assert not (tmp_path / "out").exists()


ENDED_BY_THE_SYSTEM = """
import os, signal, sys
sys.path[:] = sys.argv[1:]
from cogvideo.media import worker
decode_frames = worker.decode_frames
def decode(path, *rest, **options):
    if str(path).endswith("000003.mp4"):
        os.kill(os.getpid(), SIGNAL)
    return decode_frames(path, *rest, **options)
worker.decode_frames = decode
worker.main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_full_memory_ends_the_command_but_a_crash_skips_the_video(
    digits, tmp_path, monkeypatch, fresh_sandbox, capsys, number
):
    script = ENDED_BY_THE_SYSTEM.replace("SIGNAL", f"signal.{number.name}")
    monkeypatch.setattr("cogvideo.media.sandbox.START", script)
    out, words = tmp_path / "out", ["--frames", "frame_pixels=40", "frames_per_video=1", "videos_per_shard=2"]
    crashed = number == signal.SIGSEGV
    assert prepare(digits, out, *words) == (0 if crashed else 2)
    last = capsys.readouterr().err.splitlines()[-1]
    if crashed:
        assert "1 of 6 captions skipped" in last and "SIGSEGV" in (out / "skipped.jsonl").read_text()
        return
    assert "000003.mp4: FFmpeg was ended with SIGKILL, which the system does when memory is full" in last
    assert [shard.name for shard in (out / "shards").iterdir()] == ["00000"] and not (out / "manifest.json").exists()
    monkeypatch.undo()
    assert prepare(digits, out, *words) == 0
    assert len(FrameDataset(out)) == 6 and not (out / "skipped.jsonl").read_text()


def test_strict_tries_again_what_a_begun_folder_skipped(mixed, tokenizer, tmp_path, capsys):
    out, words = tmp_path / "out", ["--tokenizer", tokenizer, "frame_pixels=40", "videos_per_shard=1"]
    assert prepare(mixed, out, *words) == 0
    before = contents(out)
    assert prepare(mixed, out, *words, "strict=true") == 2
    assert "cut.mp4 is cut short" in capsys.readouterr().err.splitlines()[-1]
    assert contents(out) == before
    (mixed.parent / "cut.mp4").write_bytes((mixed.parent / "a.mp4").read_bytes())
    assert prepare(mixed, out, *words, "strict=true") == 2
    assert "none.mp4 is not a file" in capsys.readouterr().err.splitlines()[-1]


def test_strict_keeps_shards_whose_clips_were_left_out_for_their_pixels(digits, tokenizer, tmp_path):
    out = tmp_path / "out"
    words = ["--tokenizer", tokenizer, "frame_pixels=40", "videos_per_shard=1", "clips.min_motion=4"]
    assert prepare(digits, out, *words) == 0
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text("utf-8").splitlines()]
    assert skipped and all(entry["screened"] for entry in skipped)
    before = {shard.name: shard.stat().st_ino for shard in (out / "shards").iterdir()}
    (out / "manifest.json").unlink()  # as if the first run had not finished
    assert prepare(digits, out, *words, "strict=true") == 0
    assert {shard.name: shard.stat().st_ino for shard in (out / "shards").iterdir()} == before


def test_frames_for_the_image_tokenizer(digits, tmp_path):
    assert prepare(digits, tmp_path / "frames", "--frames", "frame_pixels=40", "frames_per_video=3") == 0
    frames = FrameDataset(tmp_path / "frames")
    assert len(frames) == 18 and frames.frames([0, 17]).shape == (2, 40, 40, 3)
    whole, _ = read_video(digits.parent / "clips/000000.mp4")
    assert np.array_equal(frames.frames([0, 1, 2]), whole[[0, 16, 32]])


def test_a_dry_run_counts_and_writes_nothing(mixed, tokenizer, tmp_path, capsys):
    words = ["--tokenizer", tokenizer, "frame_pixels=40", "--dry-run"]
    assert prepare(mixed, tmp_path / "out", *words) == 0
    out_text = capsys.readouterr().out
    assert "7 captions of 5 videos; 4 captions would be skipped" in out_text
    assert "3 rows" in out_text and "1 of 2 s, 2 of 4 s" in out_text
    assert not (tmp_path / "out").exists()


def test_frames_that_are_not_a_whole_number_of_tokens_are_refused(digits, tokenizer, tmp_path, capsys):
    assert prepare(digits, tmp_path / "out", "--tokenizer", tokenizer, "frame_pixels=41") == 2
    assert "not a multiple of the image tokenizer's compress rate 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_crops_are_squares_of_the_frames_whatever_the_batches(tmp_path, digits):
    words = ["--frames", "frame_pixels=40", "frames_per_video=2"]
    assert prepare(digits, tmp_path / "whole", *words) == 0
    assert prepare(digits, tmp_path / "a", *words, "crop_pixels=24") == 0
    assert prepare(digits, tmp_path / "b", *words, "crop_pixels=24", "encode_batch=1", "workers=1") == 0
    whole, crops = (FrameDataset(tmp_path / name).frames(range(12)) for name in ("whole", "a"))
    assert crops.shape == (12, 24, 24, 3)
    places = set()
    for frame, crop in zip(whole, crops, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(frame, crop.shape)[:, :, 0]
        found = np.argwhere((windows == crop).all(axis=(2, 3, 4)))
        assert len(found)
        places.add(tuple(found[0]))
    assert len(places) > 1
    assert np.array_equal(crops, FrameDataset(tmp_path / "b").frames(range(12)))


def test_crops_are_for_frames_and_no_larger(tmp_path, digits, tokenizer, capfd):
    assert prepare(digits, tmp_path / "out", "--tokenizer", tokenizer, "frame_pixels=40", "crop_pixels=24") == 2
    assert "--frames" in capfd.readouterr().err
    assert prepare(digits, tmp_path / "out", "--frames", "frame_pixels=40", "crop_pixels=41") == 2
    assert "crop_pixels=41" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fit_says_how_frames_become_square(tmp_path, capfd):
    tall = np.zeros((8, 96, 32, 3), np.uint8)
    tall[:, :32] = 200
    write_video(tmp_path / "v.mp4", tall, 8)
    (tmp_path / "c.jsonl").write_text(json.dumps({"video": "v.mp4", "caption": "x"}) + "\n")

    def first_frame(*words):
        out = tmp_path / "-".join(["out", *words])
        assert prepare(tmp_path / "c.jsonl", out, "--frames", "frame_pixels=32", "frames_per_video=1", *words) == 0
        return FrameDataset(out).frames([0])[0]

    assert first_frame().max() < 60 and first_frame("crop_place=top").min() > 150
    padded = first_frame("fit=pad")
    assert padded[2:8, 12:20].min() > 150 and not padded[:, :10].any() and not padded[:, 22:].any()
    assert "fit" not in json.loads((tmp_path / "out" / "plan.json").read_text())["config"], "older folders can go on"
    assert prepare(tmp_path / "c.jsonl", tmp_path / "no", "--frames", "fit=pad", "crop_place=top") == 2
    assert "crop_place=top with fit=pad" in capfd.readouterr().err


def test_the_part_before_the_damage_is_used(digits, tmp_path, capfd):
    data = (digits.parent / "clips/000000.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    (tmp_path / "c.jsonl").write_text(json.dumps({"video": "cut.mp4", "caption": "x"}) + "\n")
    words = ["--frames", "frame_pixels=40", "frames_per_video=2"]
    assert prepare(tmp_path / "c.jsonl", tmp_path / "out", *words) == 0
    assert len(FrameDataset(tmp_path / "out")) == 2
    (entry,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert entry["caption"] is None and "of cut.mp4, which is cut short or damaged" in entry["reason"]
    assert read_manifest(tmp_path / "out", "frames")["skipped"] == 0
    assert prepare(tmp_path / "c.jsonl", tmp_path / "strict", *words, "strict=true") == 2
