"""Video files: pixels, exact times, GIFs, uploads from strangers, and damaged or foreign files."""

from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import av
import numpy as np
import pytest
from PIL import Image

from cogvideo.media import frame_index, video
from cogvideo.media.container import Limits
from cogvideo.media.decoder import decode_frames
from cogvideo.media.video import check_untrusted, probe_video, read_video, stream_video, write_gif, write_video


def moving(count=20, height=48, width=64):
    """Smooth frames that differ: a bright bar that moves right on a slope of grey."""
    frames = np.tile(np.linspace(40, 120, width)[None, None, :, None], (count, height, 1, 3))
    for index in range(count):
        frames[index, :, 2 * index : 2 * index + 8] = (220, 60, 40)
    return frames.astype(np.uint8)


@pytest.fixture
def clip(tmp_path):
    write_video(tmp_path / "clip.mp4", moving(), 10, pixel_format="yuv444p", crf=4)
    return tmp_path / "clip.mp4"


def test_frames_and_times_come_back(clip):
    frames, seconds = read_video(clip)
    assert np.array_equal(seconds, np.arange(20) / 10)
    assert frames.shape == (20, 48, 64, 3) and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - moving()).mean() < 1.5


def test_probing_gives_the_same_times(clip):
    info = probe_video(clip)
    assert (info.width, info.height) == (64, 48) and info.duration == pytest.approx(1.9)
    assert np.array_equal(info.seconds, read_video(clip)[1])


@pytest.mark.parametrize("rate", [8, 25, Fraction(30000, 1001), 12.5])
def test_rates_are_exact(tmp_path, rate):
    write_video(tmp_path / "v.mp4", moving(9), rate)
    seconds = probe_video(tmp_path / "v.mp4").seconds
    assert np.allclose(seconds, np.arange(9) / float(rate), atol=1e-4)


def test_variable_rates_keep_each_frames_timestamp(tmp_path):
    ticks = [0, 90, 100, 350, 351, 600, 1000]
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for tick, pixels in zip(ticks, moving(7), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.allclose(read_video(tmp_path / "v.mkv")[1], np.array(ticks) / 1000, atol=1e-3)
    assert np.allclose(probe_video(tmp_path / "v.mkv").seconds, np.array(ticks) / 1000, atol=1e-3)


def test_a_span_and_single_frames(clip):
    whole, times = read_video(clip)
    part, seconds = read_video(clip, start=0.5, end=1.2)
    assert np.allclose(seconds, np.arange(5, 13) / 10) and np.array_equal(part, whole[5:13])
    picked, seconds = read_video(clip, only=times[[3, 11, 19]])
    assert np.array_equal(picked, whole[[3, 11, 19]]) and np.array_equal(seconds, times[[3, 11, 19]])


def test_seeking_finds_the_same_frames(tmp_path):
    write_video(tmp_path / "long.mp4", np.concatenate([moving(28)] * 12), 10)
    whole, times = read_video(tmp_path / "long.mp4")
    part, seconds = read_video(tmp_path / "long.mp4", start=25.0, end=26.0)
    assert np.array_equal(seconds, times[250:261]) and np.array_equal(part, whole[250:261])


def test_resizing_crops_to_the_centre_square(tmp_path):
    wide = np.zeros((3, 40, 120, 3), np.uint8)
    wide[:, :, 40:80] = 200
    write_video(tmp_path / "wide.mp4", wide, 5, pixel_format="yuv444p", crf=2)
    frames, _ = read_video(tmp_path / "wide.mp4", side=20)
    assert frames.shape == (3, 20, 20, 3) and frames[:, 2:-2, 2:-2].min() > 190
    tall, _ = read_video(tmp_path / "wide.mp4", side=80)
    assert tall.shape == (3, 80, 80, 3)


def test_odd_sizes_are_padded_to_even_ones(tmp_path):
    write_video(tmp_path / "odd.mp4", moving(4, 33, 45), 5)
    assert read_video(tmp_path / "odd.mp4")[0].shape == (4, 34, 46, 3)
    write_video(tmp_path / "exact.mp4", moving(4, 33, 45), 5, pixel_format="yuv444p")
    assert read_video(tmp_path / "exact.mp4")[0].shape == (4, 33, 45, 3)


def test_memory_is_bounded(clip):
    with pytest.raises(ValueError, match="MiB of decoded frames"):
        read_video(clip, max_bytes=100_000)
    assert len(read_video(clip, side=8, max_bytes=100_000)[0]) == 20


def test_probing_keeps_no_packets_in_memory(tmp_path, monkeypatch):
    class Packet:
        size, is_corrupt, is_discard, is_keyframe = 1, False, False, True

        def __init__(self, pts):
            self.pts = self.dts = pts

    alive, most = WeakSet(), []

    def demux(stream):
        for pts in range(50):
            packet = Packet(pts)
            alive.add(packet)
            most.append(len(alive))
            yield packet

    codec = SimpleNamespace(
        has_b_frames=False,
        codec=SimpleNamespace(canonical_name="mjpeg"),
        decode=lambda packet: [SimpleNamespace(pts=packet.pts, is_corrupt=False)],
    )
    stream = SimpleNamespace(
        time_base=Fraction(1, 10), guessed_rate=10, width=16, height=16, codec_context=codec, index_entries=()
    )
    stream.sample_aspect_ratio = None
    container = SimpleNamespace(demux=demux, format=SimpleNamespace(flags=0, name="nut"))
    monkeypatch.setattr(frame_index, "open_video", lambda *args, **options: nullcontext((container, stream)))
    assert np.array_equal(frame_index.index_frames(__file__).seconds, np.arange(50) / 10)
    assert max(most) <= 2


def test_frames_larger_than_the_header_says_are_bounded(tmp_path, monkeypatch):
    def jpeg(side):
        encoder = av.CodecContext.create("mjpeg", "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = side, side, "yuvj420p", Fraction(1, 5)
        frame = av.VideoFrame(side, side, "yuvj420p")
        frame.pts = 0
        return bytes((encoder.encode(frame) + encoder.encode())[0])

    path = tmp_path / "grows.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        for index, side in enumerate((16, 200)):
            packet = av.Packet(jpeg(side))
            packet.pts = packet.dts = index
            packet.stream, packet.time_base = stream, Fraction(1, 5)
            container.mux(packet)
    assert read_video(path, side=8)[0].shape == (2, 8, 8, 3)
    info, small = probe_video(path), Limits(max_pixels=100 * 100)
    assert len(list(decode_frames(path, info, info.seconds[:1], limits=small))) == 1
    with pytest.raises(ValueError, match="only 1 of 2 wanted frames can be decoded"):
        list(decode_frames(path, info, info.seconds, limits=small))


@pytest.mark.parametrize("size", [0, 60, 0.3, 0.6, -1])
def test_a_truncated_file_is_an_error(clip, tmp_path, size):
    data = clip.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: size if isinstance(size, int) else int(size * len(data))])
    for read in (probe_video, read_video):
        with pytest.raises(ValueError, match=str(cut)) as caught:
            read(cut)
        assert "\n" not in str(caught.value)


def test_files_that_are_not_videos_are_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("hello " * 100)
    for path, message in [("none.mp4", "not a file"), ("", "not a file"), ("text.mp4", "not a readable video")]:
        with pytest.raises(ValueError, match=message):
            read_video(tmp_path / path)


def test_sound_without_video_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="no video stream"):
        probe_video(tmp_path / "sound.wav")


def test_an_empty_span_is_refused(clip):
    with pytest.raises(ValueError, match="no frame between 5 s and 6 s"):
        read_video(clip, start=5, end=6)


def test_a_failed_write_leaves_no_file(tmp_path):
    def frames():
        yield from moving(3)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "v.mp4", frames(), 5)
    rates = [((moving(2), fps), "is not a frame rate") for fps in (0, 1e-9, float("inf"), float("nan"))]
    for bad, message in [((moving(0), 5), "no frames"), *rates]:
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / "v.mp4", *bad)
    assert list(tmp_path.iterdir()) == []


def noise(count, side=16, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, side, side, 3)).astype(np.uint8)


def durations(path):
    with Image.open(path) as picture:
        times = []
        for index in range(picture.n_frames):
            picture.seek(index)
            times.append(picture.info["duration"])
        return times


@pytest.mark.parametrize("fps", [4, 8, 12, 30])
def test_a_gif_lasts_as_long_as_its_frames(tmp_path, fps):
    write_gif(tmp_path / "a.gif", noise(33), fps)
    times = durations(tmp_path / "a.gif")
    assert len(times) == 33 and abs(sum(times) / 1000 - 33 / fps) <= 0.01
    assert max(times) - min(times) <= 10


def test_merged_equal_frames_keep_their_time(tmp_path):
    write_gif(tmp_path / "a.gif", np.repeat(noise(3), 4, axis=0), 4)
    assert sum(durations(tmp_path / "a.gif")) == 3000


def test_gif_colours_and_scale(tmp_path):
    frames = np.full((2, 8, 10, 3), (16, 16, 24), np.uint8)
    frames[1, 2:5] = (230, 50, 48)
    write_gif(tmp_path / "a.gif", frames, 8, scale=3)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.size == (30, 24)
        picture.seek(1)
        found = np.array(picture.convert("RGB"))[::3, ::3]
    assert np.abs(found.astype(int) - frames[1]).max() <= 4


@pytest.mark.parametrize(("count", "fps"), [(0, 8), (2, 0), (2, 60)])
def test_invalid_gifs_are_refused(tmp_path, count, fps):
    with pytest.raises(ValueError, match=r"no frames|frames per second"):
        write_gif(tmp_path / "a.gif", noise(count), fps)
    assert not (tmp_path / "a.gif").exists()


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "bmp", "tiff", "mp4"])
def test_plain_containers_are_accepted(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "mp4":
        write_video(path, np.zeros((4, 16, 24, 3), np.uint8), 2)
    else:
        Image.new("RGB", (24, 16)).save(path)
    info = check_untrusted(path)
    assert (info.width, info.height, len(info.seconds)) == (24, 16, 4 if ending == "mp4" else 1)


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat", "list.png"])
def test_files_that_refer_to_others_are_refused(tmp_path: Path, name: str) -> None:
    """By default FFmpeg would read the video that these lists name."""
    write_video(tmp_path / "secret.mp4", np.zeros((4, 16, 16, 3), np.uint8), 2)
    for text in ("ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="is not a readable picture or video"):
            check_untrusted(tmp_path / name)


def test_large_and_long_uploads_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (300, 20)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png has no frame .*, or its frames exceed 5999 pixels; send a"):
        check_untrusted(tmp_path / "wide.png", max_pixels=5999)
    moves = [Image.new("RGB", (300, 20), colour) for colour in ("red", "blue")]
    moves[0].save(tmp_path / "moves.webp", save_all=True, append_images=moves[1:])  # FFmpeg takes its size for 0x0
    with pytest.raises(ValueError, match="has no frame that FFmpeg can read"):
        check_untrusted(tmp_path / "moves.webp", max_pixels=5999)
    write_video(tmp_path / "long.mp4", np.zeros((9, 16, 16, 3), np.uint8), 2)
    with pytest.raises(ValueError, match=r"long\.mp4 lasts 4 seconds; send at most 3"):
        check_untrusted(tmp_path / "long.mp4", max_seconds=3)


def test_a_name_with_an_image_sequence_pattern_is_refused(tmp_path: Path) -> None:
    for name in ("a001.png", "a%03d.png"):
        Image.new("RGB", (24, 16)).save(tmp_path / name)
    with pytest.raises(ValueError, match="is not a readable picture or video"):
        check_untrusted(tmp_path / "a%03d.png")


def test_frames_are_streamed_as_they_are_read(clip, tmp_path):
    frames, seconds = read_video(clip)
    streamed = list(stream_video(clip))
    assert [time for _, time in streamed] == seconds.tolist()
    assert all(np.array_equal(one, other) for (one, _), other in zip(streamed, frames, strict=True))
    some = list(stream_video(clip, only=seconds[[1, 4]]))
    assert [time for _, time in some] == seconds[[1, 4]].tolist() and np.array_equal(some[1][0], frames[4])
    with pytest.raises(ValueError, match="only 0 of 1 wanted frames"):
        next(stream_video(clip, only=np.array([99.0])))


def test_frames_stored_out_of_order_are_streamed_in_order_of_time(clip):
    info = probe_video(clip, exact=True)
    frames, seconds = read_video(clip)
    stored = np.arange(len(seconds))[::-1]  # the first frame shown is the last decoded
    swapped = replace(info, outputs=stored)
    assert [time for _, time in stream_video(clip, info=swapped)] == seconds.tolist()
    assert np.array_equal(next(stream_video(clip, info=swapped))[0], frames[-1])


def test_frames_of_several_sizes_are_not_streamed(clip, monkeypatch):
    sizes = [(np.zeros((16, 16, 3), np.uint8), 0.0), (np.zeros((8, 16, 3), np.uint8), 0.25)]
    monkeypatch.setattr(video, "read_frames", lambda *_: iter(sizes))
    with pytest.raises(ValueError, match=r"the frame at 0\.25 s has 16x8 pixels, the first 16x16; expected one size"):
        list(stream_video(clip))
