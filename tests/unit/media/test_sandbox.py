"""FFmpeg in other processes: what a file may take, and what becomes of one that takes more."""

import errno
import os
import signal
import struct

import numpy as np
import pytest
from PIL import Image

from cogvideo.media import sandbox
from cogvideo.media.container import Limits
from cogvideo.media.video import probe_video, read_video, write_video
from tests.helpers.hostile import claim, mp4, table


@pytest.fixture
def clip(tmp_path):
    write_video(tmp_path / "v.mp4", np.zeros((5, 16, 16, 3), np.uint8), 5)
    return tmp_path / "v.mp4"


def claim_samples(clip, count):
    """Make the index of an MP4 claim so many samples of one byte."""
    data = bytearray(clip.read_bytes())
    sizes, times = data.index(b"stsz"), data.index(b"stts")
    data[sizes + 8 : sizes + 16] = struct.pack(">II", 1, count)
    data[times + 12 : times + 16] = struct.pack(">I", count)
    chunks = data.index(b"stsc")
    data[chunks + 16 : chunks + 20] = struct.pack(">I", count)
    clip.write_bytes(data)


def test_one_process_serves_many_files(clip, fresh_sandbox):
    read_video(clip)
    pid = fresh_sandbox[0].process.pid
    assert pid != os.getpid()
    with pytest.raises(ValueError, match="not a file"):
        probe_video(clip.with_name("none.mp4"))
    assert len(read_video(clip)[0]) == 5 and [worker.process.pid for worker in fresh_sandbox] == [pid]


def test_a_claimed_index_takes_little_memory(clip, fresh_sandbox):
    claim_samples(clip, 60_000_000)
    with pytest.raises(ValueError, match=r"v\.mp4") as caught:
        probe_video(clip)
    assert "\n" not in str(caught.value)
    for worker in fresh_sandbox:  # gone, or small
        with open(f"/proc/{worker.process.pid}/status", encoding="ascii") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        assert peak < 450 << 10


@pytest.mark.parametrize("count", [5000, 1 << 18])
def test_no_more_frames_are_believed_than_fit_into_the_file(tmp_path, count):
    path = tmp_path / "v.mp4"
    path.write_bytes(mp4(table(**claim(count))))
    with pytest.raises(ValueError, match=r"v\.mp4 has too many frames; expected at most 13\d\d$"):
        probe_video(path)


def test_a_process_that_dies_is_an_error_of_its_file(clip, fresh_sandbox):
    probe_video(clip)
    os.kill(fresh_sandbox[0].process.pid, signal.SIGSEGV)
    fresh_sandbox[0].process.wait()
    with pytest.raises(ValueError, match=r"v\.mp4 cannot be read: FFmpeg ended with SIGSEGV"):
        probe_video(clip)
    assert len(probe_video(clip).seconds) == 5, "the next process reads on"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_the_system_ended_is_replaced(clip, fresh_sandbox, number):
    probe_video(clip)
    os.kill(fresh_sandbox[0].process.pid, number)
    fresh_sandbox[0].process.wait()
    assert len(probe_video(clip).seconds) == 5


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            r"FFmpeg was ended with SIGKILL, which the system does when memory is",
        ),
        ("os.kill(os.getpid(), signal.SIGTERM)", r"FFmpeg was ended with SIGTERM; run the command again"),
        ("sys.exit(1)", r"FFmpeg exited with code 1; check the installation"),
    ],
)
def test_what_ends_processes_from_outside_is_not_the_files_fault(
    clip, fresh_sandbox, monkeypatch, tmp_path, end, words
):
    note = f"open({str(tmp_path / 'tries')!r}, 'a').write('x')"
    monkeypatch.setattr(sandbox, "START", f"import os, signal, sys; {note}; sys.stdin.buffer.read(9); {end}")
    with pytest.raises(ChildProcessError, match=words) as caught:
        probe_video(clip)
    assert caught.value.filename == str(clip) and (tmp_path / "tries").read_text() == "xx"


def test_a_process_lost_between_two_answers_is_not_replaced(clip, fresh_sandbox):
    info = probe_video(clip)
    process = fresh_sandbox[0].process
    frames = sandbox.read_frames(clip, info, info.seconds, None, Limits())
    next(frames)
    process.kill()
    process.wait()
    with pytest.raises(ChildProcessError, match="SIGKILL"):
        for _ in range(1 << 20):  # the pipe holds the first ones
            next(frames)


def test_a_failing_disk_is_no_error_of_the_file(clip, fresh_sandbox):
    """A process's memory reads as a file on a disk that fails: error EIO at its beginning."""
    for read in (probe_video, lambda path: sandbox.read_picture(path, Limits())):
        with pytest.raises(OSError) as caught:
            read("/proc/self/mem")
        assert caught.value.errno == errno.EIO and caught.value.filename == "/proc/self/mem"
    assert len(probe_video(clip).seconds) == 5


SCRIPT_OF_A_FAILING_DISK = """
import errno, os, sys
sys.path[:] = sys.argv[1:]
from cogvideo.media import byte_range, container, worker
def fail(path):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
worker.check_readable = container.check_readable = fail
worker.main()
"""


def test_a_disk_that_fails_in_the_middle_of_a_file_does_not_end_the_video_there(clip, fresh_sandbox, monkeypatch):
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) - 40])
    monkeypatch.setattr(sandbox, "START", SCRIPT_OF_A_FAILING_DISK)
    with pytest.raises(OSError) as caught:
        probe_video(clip, partial=True)
    assert caught.value.errno == errno.ESTALE


def test_a_file_that_takes_too_long_is_an_error(clip, fresh_sandbox, monkeypatch):
    probe_video(clip)
    os.kill(fresh_sandbox[0].process.pid, signal.SIGSTOP)
    monkeypatch.setattr(sandbox, "WALL_FACTOR", 0.05)
    with pytest.raises(ValueError, match="it takes more than 1 seconds"):
        probe_video(clip, limits=Limits(cpu_seconds=1))


@pytest.mark.parametrize(
    "answer",
    [
        b'{"kind": "part", "arrays": [["|u1", [1, 1, 3]]]}\n',  # and ends in the middle of it
        b'{"kind": "part", "arrays": [["|u1", [99999, 99999, 3]]]}\n',
        b'{"kind": "part", "arrays": [["|O", [1]]]}\n',
        b'{"kind": "part", "arrays": [["|u1", [-1]]]}\n',
        b'{"kind": "part", "arrays": [["|u1", [1, 1, 1, 1]]]}\n',
        b'{"kind": "part", "arrays": [["|u1"]]}\n',
        b'{"kind": "part", "arrays": 3}\n',
        b'{"kind": "part", "arrays": []}\n{"kind": "end", "retire": false}\n',
        b'{"kind": "part", "arrays": [["<f8", [2]], ["<f8", [0]]]}\n'
        + bytes(16)
        + b'{"kind": "end", "retire": false}\n',
        b'{"kind": "end", "retire": false}\n',
        b'{"kind": "end"}\n',
        b'{"kind": "part", "arrays": [' + b", ".join([b'["|u1", [0]]'] * 4) + b"]}\n",
        b'{"kind": "OSError", "retire": false, "message": ""}\n',
        b'{"kind": "OSError", "retire": false, "message": "", "errno": 2}\n',
        b'{"kind": "OSError", "retire": false, "message": "", "errno": [5]}\n',
        b"[]\n",
        b"{\n",
        b"[" * 9000 + b"\n",
        b'{"kind": ' + b"9" * 5000 + b"}\n",
        b"\xff\n",
        b"x" * 100,
    ],
)
def test_damaged_answers_are_one_line(clip, fresh_sandbox, monkeypatch, answer):
    """As from a process that a file has taken over, or that was ended while it answered."""
    script = f"import sys; sys.stdout.buffer.write({answer!r})"
    monkeypatch.setattr(sandbox, "START", script)
    for read in (sandbox.index_frames, sandbox.read_picture):
        more = {"spans": None, "exact": False} if read is sandbox.index_frames else {}
        with pytest.raises(ValueError, match=r"v\.mp4 cannot be read: the process that parses it") as caught:
            read(clip, limits=Limits(), **more)
        assert "\n" not in str(caught.value)
        while fresh_sandbox:
            fresh_sandbox.pop().kill()


@pytest.mark.parametrize(
    "changed",
    [{}, {"width": "16"}, {"origin": 0.5}, {"damage": 3}, {"pixel_aspect": ["x"]}, {"pixel_aspect": [1, 0]}, None],
)
def test_an_index_of_another_form_is_one_line(clip, monkeypatch, changed):
    fields = {"width": 16, "height": 16, "pixel_aspect": [1, 1], "exif_orientation": None, "origin": 0, "damage": None}
    answers = [] if changed is None else [(fields | changed, (np.zeros(2), np.zeros(0)))]
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: iter(answers))
    if changed == {}:
        assert probe_video(clip).width == 16
    else:
        with pytest.raises(
            ValueError, match=r"v\.mp4 cannot be read: the process that parses it gave a damaged answer"
        ):
            probe_video(clip)


def test_frames_are_counted(clip):
    with pytest.raises(ValueError, match=r"v\.mp4 has too many frames; expected at most 4"):
        probe_video(clip, limits=Limits(max_frames=4))
    assert len(probe_video(clip, limits=Limits(max_frames=5)).seconds) == 5


def test_an_abandoned_reading_ends_its_process(clip, fresh_sandbox):
    info = probe_video(clip)
    process = fresh_sandbox[0].process
    frames = sandbox.read_frames(clip, info, info.seconds, None, Limits())
    next(frames)
    frames.close()
    assert process.poll() is not None and not fresh_sandbox


def test_a_playlist_reaches_no_other_machine(tmp_path):
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    with pytest.raises(ValueError, match=r"a\.m3u8"):
        probe_video(tmp_path / "a.m3u8")


def test_odd_files_are_errors(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "empty.mp4").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    for name in ("fifo.mp4", "folder.mp4", "loop.mp4", "empty.mp4", "x" * 300 + ".mp4", "good.png/a.mp4", "/dev/zero"):
        with pytest.raises(ValueError) as caught:
            probe_video(tmp_path / name)
        assert "\n" not in str(caught.value)
