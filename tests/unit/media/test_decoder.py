"""Which frames are shown and when: timestamps that cannot be trusted, hidden frames, damage, names of files."""

import os
from contextlib import contextmanager
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from cogvideo.media import decoder
from cogvideo.media.byte_range import ByteRange
from cogvideo.media.container import DamagedVideoError
from cogvideo.media.frame_index import index_frames
from cogvideo.media.truncation import _matroska_end
from cogvideo.media.video import probe_video, read_video


def encode(path, stamps, codec="mjpeg", size=(48, 32), options=None, muxer=None):
    """Write a video with a frame at each stamp, in tenths of a second; frame k has the grey level 7 * k % 256."""
    with av.open(str(path), "w", container_options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        packets = []
        for index in range(len(stamps)):
            frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), 7 * index % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index if codec == "mjpeg" else stamps[index], Fraction(1, 10)
            packets += stream.encode(frame)
        for index, packet in enumerate(packets + stream.encode()):
            if codec == "mjpeg":  # each packet is a frame
                packet.pts, packet.dts = stamps[index], index - len(stamps)
            container.mux(packet)
    return path


def levels(frames):
    return np.rint(frames.mean(axis=(1, 2, 3)) / 7).astype(int).tolist()


def each_alone(path):
    """Every frame read on its own."""
    seconds = probe_video(path).seconds
    return np.concatenate([read_video(path, only=seconds[index : index + 1])[0] for index in range(len(seconds))])


def test_frames_are_ordered_by_their_times(tmp_path):
    path = encode(tmp_path / "a.mkv", [2, 0, 1, 5, 3, 4])
    frames, seconds = read_video(path)
    assert levels(frames) == [1, 2, 0, 4, 5, 3] and np.allclose(seconds, np.arange(6) / 10)
    assert np.array_equal(each_alone(path), frames)


def test_of_frames_with_one_time_the_first_is_read(tmp_path):
    frames, seconds = read_video(encode(tmp_path / "a.mkv", [0, 1, 1, 2]))
    assert levels(frames) == [0, 1, 3] and np.allclose(seconds, [0, 0.1, 0.2])


def test_times_count_from_the_first_frame(tmp_path):
    for start in (0, 7, 300):
        path = encode(tmp_path / "a.mkv", list(range(start, start + 5)))
        assert np.allclose(probe_video(path).seconds, np.arange(5) / 10)


def test_packets_without_presentation_times_are_shown_in_the_decoders_order(tmp_path):
    path = encode(tmp_path / "a.avi", list(range(20)), "libx264", options={"bf": "2"})
    frames, seconds = read_video(path)
    assert levels(frames) == list(range(20)) and np.allclose(seconds, np.arange(20) / 10)
    assert np.array_equal(each_alone(path), frames)


def test_what_comes_before_the_first_key_frame_is_not_shown(tmp_path):
    options = {"g": "10", "bf": "0", "sc_threshold": "0"}
    data = encode(tmp_path / "a.ts", list(range(30)), "libx264", options=options).read_bytes()
    (tmp_path / "mid.ts").write_bytes(data[: 3 * 188] + data[len(data) // 188 // 6 * 188 :])
    frames, seconds = read_video(tmp_path / "mid.ts")
    assert levels(frames)[0] % 10 == 0 and levels(frames)[-1] == 29 and seconds[0] == 0
    assert np.array_equal(each_alone(tmp_path / "mid.ts"), frames)


def test_timestamps_that_start_anew_go_on(tmp_path):
    data = encode(tmp_path / "a.ts", list(range(15)), "libx264").read_bytes()
    (tmp_path / "twice.ts").write_bytes(data + data)
    frames, seconds = read_video(tmp_path / "twice.ts")
    assert levels(frames) == 2 * list(range(15)) and np.allclose(np.diff(seconds), 0.1, atol=0.05)


def test_seeking_in_a_stream_without_an_index_finds_every_frame(tmp_path):
    path = encode(tmp_path / "a.ts", list(range(31)), "libx264", options={"g": "9", "bf": "3"})
    frames, _ = read_video(path)
    assert levels(frames) == list(range(31)) and np.array_equal(each_alone(path), frames)


GROUPS = {"g": "20", "bf": "3", "sc_threshold": "0", "preset": "ultrafast"}


def decoded_counts(monkeypatch):
    """Counts the frames that are decoded in this process; the list grows by one for each."""
    count, frames = [], decoder.decode_packets
    monkeypatch.setattr(decoder, "decode_packets", lambda *args: (count.append(1) or frame for frame in frames(*args)))
    return count


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", GROUPS),
        ("a.mkv", "libx264", GROUPS | {"x264-params": "open-gop=1:b-pyramid=normal"}),
        ("a.mp4", "libx264", GROUPS | {"x264-params": "intra-refresh=1"}),
        ("a.mov", "libx264", GROUPS | {"flags": "+ildct+ilme", "x264-params": "tff=1"}),
        ("a.mp4", "mpeg4", {"g": "20", "bf": "2"}),
        ("a.avi", "mpeg4", {"g": "20"}),
    ],
)
def test_frames_far_apart_are_those_of_the_whole_video(tmp_path, name, codec, options):
    path = encode(tmp_path / name, range(90), codec, (64, 64), options)
    info = probe_video(path)
    frames, seconds = read_video(path, info=info)
    for chosen in ([0, 89], [1, 45, 46, 88], [19, 20, 21, 60], [38, 59, 79], [7]):
        found, times = read_video(path, only=info.seconds[chosen], info=info)
        assert np.array_equal(found, frames[chosen]) and np.array_equal(times, seconds[chosen])


@pytest.mark.parametrize(
    ("name", "options", "muxer"),
    [
        ("a.mp4", GROUPS, {}),
        ("a.mov", GROUPS | {"bf": "0"}, {}),
        ("a.mp4", GROUPS | {"x264-params": "open-gop=1:b-pyramid=normal"}, {}),
        ("a.mp4", GROUPS | {"g": "600"}, {}),
        ("a.mp4", GROUPS, {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mkv", GROUPS, {}),
    ],
)
def test_frames_of_spans_are_those_of_the_whole_video(tmp_path, name, options, muxer):
    stamps = np.cumsum(np.random.default_rng(0).integers(1, 4, 500)).tolist()  # no constant rate
    path = encode(tmp_path / name, stamps, "libx264", (64, 64), options, muxer)
    whole, last = index_frames(path), (stamps[-1] - stamps[0]) / 10
    for spans in (
        [(20, 21.5)],
        [(60, 62), (10, 10)],
        [(3, 50), (40, 45)],
        [(90, None)],
        [(last, last + 9)],
        [(500, 501)],
    ):
        info = index_frames(path, spans=tuple(spans))
        for start, end in spans:
            found, wanted = (
                times[(times >= start) & (times <= (end or np.inf))] for times in (info.seconds, whole.seconds)
            )
            assert np.array_equal(found, wanted)
        assert info.origin == whole.origin and set(info.key_seconds) <= set(whole.key_seconds)
        if len(found):
            only = found[:: len(found) // 3 + 1]
            assert np.array_equal(read_video(path, only=only, info=info)[0], read_video(path, only=only)[0])


def test_packets_between_spans_are_not_read(tmp_path):
    path = encode(tmp_path / "a.mp4", range(3000), "libx264", (64, 64), GROUPS)
    info = index_frames(path, spans=((100.0, 101.0), (250.0, 251.0)))
    assert len(info.seconds) < 300


def test_damage_outside_the_spans_is_found_like_that_in_them(tmp_path):
    path = encode(tmp_path / "a.mp4", range(600), "libx264", (64, 64), GROUPS, {"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    assert probe_video(path, spans=((1.0, 2.0),), partial=True).damage is not None


def test_what_lies_between_frames_far_apart_is_not_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", range(90), "libx264", (64, 64), GROUPS)
    info, count = index_frames(path), decoded_counts(monkeypatch)
    times = [time for time, _ in decoder.decode_frames(path, info, info.seconds[[0, 42, 85]])]
    assert times == info.seconds[[0, 42, 85]].tolist() and len(count) < 20


def test_frames_that_nothing_refers_to_are_not_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", range(90), "libx264", (64, 64), GROUPS | {"g": "90", "b_strategy": "0"})
    info, count = index_frames(path), decoded_counts(monkeypatch)
    assert len(list(decoder.decode_frames(path, info, info.seconds[[1, 88]]))) == 2
    assert len(count) < 60


def test_a_container_that_seeks_too_early_is_not_read_again_and_again(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", range(90), "libx264", (64, 64), GROUPS)
    info, count = index_frames(path), decoded_counts(monkeypatch)
    wanted = info.seconds[[15, 35, 55, 75]]
    chosen = decoder.open_video

    @contextmanager
    def from_the_start(*args, **options):
        with chosen(*args, **options) as (container, stream):
            early = SimpleNamespace(demux=container.demux, format=container.format)
            early.seek = lambda offset, stream: container.seek(0, stream=stream)
            yield early, stream

    monkeypatch.setattr(decoder, "open_video", from_the_start)
    assert [time for time, _ in decoder.decode_frames(path, info, wanted)] == wanted.tolist()
    assert len(count) < 120


def test_a_header_that_miscounts_is_no_damage(tmp_path):
    path = encode(tmp_path / "a.avi", list(range(12)))
    data = bytearray(path.read_bytes())
    for place in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        data[place : place + 4] = (90).to_bytes(4, "little")
    path.write_bytes(data)
    assert len(read_video(path)[0]) == 12


def test_what_precedes_the_damage_can_be_had(tmp_path):
    path = encode(tmp_path / "a.mp4", list(range(20)), "libx264", options={"bf": "0"}, muxer={"movflags": "faststart"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 200])
    with pytest.raises(DamagedVideoError, match="cut short or damaged"):
        probe_video(path)
    info = probe_video(path, partial=True)
    frames, _ = read_video(path, info=info)
    assert 5 < len(frames) < 20 and levels(frames) == list(range(len(frames))) and info.damage


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.gif"])
def test_a_file_that_ends_early_is_not_taken_for_whole(tmp_path, name):
    path, rng = tmp_path / name, np.random.default_rng(0)
    if name == "a.gif":
        pictures = [Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)) for _ in range(12)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    else:
        encode(path, list(range(12)), "libvpx" if name == "a.webm" else "mjpeg")
    whole = path.read_bytes()
    assert len(probe_video(path).seconds) == 12
    path.write_bytes(whole + bytes(9))
    assert len(probe_video(path).seconds) == 12, "more bytes are no damage"
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size][6:]
    for end in (*places, *(place + 20 for place in places)):
        path.write_bytes(whole[:end])
        with pytest.raises(DamagedVideoError, match="cut short or damaged"):
            probe_video(path)
        assert 2 < len(probe_video(path, partial=True).seconds) <= 12
        inside = tmp_path / "members"
        inside.write_bytes(b"before" + whole[:end] + whole)
        with pytest.raises(DamagedVideoError):
            probe_video(ByteRange(inside, 6, end, "members/a"))


def test_a_recording_without_its_size_may_be_whole(tmp_path):
    path = encode(tmp_path / "a.mkv", list(range(12)), muxer={"live": "1"})
    assert len(read_video(path)[0]) == 12


@pytest.mark.parametrize(
    "start", [b"", b"RIFF", bytes(40), bytes.fromhex("1a45dfa3"), bytes.fromhex("1a45dfa380180538")]
)
def test_a_segment_whose_size_cannot_be_read_is_unknown(start):
    assert _matroska_end(start) == 0


def test_damage_that_packets_do_not_show_is_found_by_decoding(tmp_path):
    path = encode(tmp_path / "a.mp4", list(range(20)), "libx264", options={"bf": "0"})
    with av.open(str(path)) as container:
        packet = next(packet for packet in container.demux(video=0) if packet.pts * packet.time_base > 1.45)
        place, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[place : place + size] = bytes([255]) * size
    path.write_bytes(data)
    info = probe_video(path)
    assert len(info.seconds) == 20
    with pytest.raises(DamagedVideoError, match="wanted frames"):
        read_video(path, info=info)
    info = probe_video(path, partial=True, exact=True)
    assert levels(read_video(path, info=info)[0]) == list(range(15))


def test_a_cover_picture_is_not_the_video(tmp_path):
    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mjpeg", rate=10) for _ in range(2)]
        for stream, size in zip(streams, (64, 32), strict=True):
            stream.width = stream.height = size
            stream.pix_fmt = "yuvj420p"
        streams[0].disposition = av.stream.Disposition.attached_pic
        for index in range(5):
            for stream in streams[index > 0 :]:
                frame = av.VideoFrame(stream.width, stream.height, "yuvj420p")
                frame.pts, frame.time_base = index, Fraction(1, 10)
                container.mux(stream.encode(frame))
    info = probe_video(path)
    assert (info.width, len(info.seconds)) == (32, 5)


NAMES = (
    b"a%03d.png",
    b"new\nline.png",
    b"-dash.png",
    b"file:x.png",
    b"http:x.png",
    b"q'\".png",
    b"\xff\xfe.png",
    b"*.png",
)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_that_of_one_file(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 16), "blue").save(tmp_path / "a001.png")
    with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
        Image.new("RGB", (24, 16), "red").save(file, "PNG")
    frames, _ = read_video(os.fsdecode(name))
    assert frames[0, 0, 0].tolist() == [255, 0, 0]
