"""Video files: pixels, exact times, and files that are damaged or none."""

from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace
from weakref import WeakSet

import av
import numpy as np
import pytest

from cogvideo.media import video
from cogvideo.media.video import probe_video, read_video, write_video


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


def test_variable_rates_keep_each_frames_own_time(tmp_path):
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


def test_resizing_cuts_the_centre_square(tmp_path):
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


def test_probing_holds_no_packets(tmp_path, monkeypatch):
    class Packet:
        size, is_corrupt, is_discard = 1, False, False

        def __init__(self, pts):
            self.pts = pts

    alive, most = WeakSet(), []

    def demux(stream):
        for pts in range(50):
            packet = Packet(pts)
            alive.add(packet)
            most.append(len(alive))
            yield packet

    stream = SimpleNamespace(start_time=0, time_base=Fraction(1, 10), frames=50, width=16, height=16)
    monkeypatch.setattr(video, "_open_stream", lambda path: nullcontext((SimpleNamespace(demux=demux), stream)))
    assert np.array_equal(probe_video("any.mp4").seconds, np.arange(50) / 10)
    assert max(most) <= 2


def test_a_frame_larger_than_the_file_says_is_bounded(tmp_path, monkeypatch):
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
    assert probe_video(path).width == 16
    assert read_video(path, side=8)[0].shape == (2, 8, 8, 3)
    monkeypatch.setattr(video, "MAX_PIXELS", 100 * 100)
    with pytest.raises(ValueError, match="not a readable video"):
        read_video(path, side=8)


@pytest.mark.parametrize("kept", [0, 60, 0.3, 0.6, -1])
def test_a_file_cut_short_is_an_error(clip, tmp_path, kept):
    data = clip.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    for read in (probe_video, read_video):
        with pytest.raises(ValueError, match=str(cut)) as caught:
            read(cut)
        assert "\n" not in str(caught.value)


def test_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("hello " * 100)
    for path, message in [("none.mp4", "not a file"), ("", "not a file"), ("text.mp4", "not a readable video")]:
        with pytest.raises(ValueError, match=message):
            read_video(tmp_path / path)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="no video stream"):
        probe_video(tmp_path / "sound.wav")


def test_an_empty_span(clip):
    with pytest.raises(ValueError, match="no frame between 5 s and 6 s"):
        read_video(clip, start=5, end=6)


def test_nothing_half_written(tmp_path):
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
