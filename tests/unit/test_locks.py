"""Locks of folders: one owner at a time, however the other ended; forked children; file systems without locks."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cogvideo import locks
from cogvideo.interrupts import signals_as_exceptions
from cogvideo.locks import LOCK_NAME, InUseError, Owner, entries, lock_folder, lock_output, remove_dead_lock

HOLD = """
import sys, time
from cogvideo.locks import lock_folder, lock_output
with (lock_folder if sys.argv[1] == "folder" else lock_output)(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(kind: str, path: Path) -> subprocess.Popen[str]:
    """Another process that holds a lock; kill it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, kind, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.0)


def write_lock(path: Path, owner: Owner) -> None:
    path.write_text(json.dumps(asdict(owner)))


ELSEWHERE = Owner("elsewhere", 7, "1", "another kernel", "another namespace", "cogvideo train run_dir=x")


def test_the_lock_is_gone_afterwards_and_so_are_folders_made_for_it(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_NAME).is_file() and entries(tmp_path / "a" / "b") == []
    assert not list(tmp_path.iterdir())
    with lock_folder(tmp_path / "a"):
        (tmp_path / "a" / "result").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


@pytest.mark.parametrize("kind", ["folder", "output"])
def test_a_second_process_is_told_of_the_first_and_takes_over_after_a_kill(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "run"
    lock = lock_folder if kind == "folder" else lock_output
    first = hold(kind, target)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with (
        pytest.raises(
            InUseError, match=rf"run is in use by process {first.pid} on .*; wait until it ends, or"
        ) as caught,
        lock(target),
    ):
        pass
    assert "\n" not in str(caught.value) and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == files
    first.kill()
    first.wait()
    assert len(list(tmp_path.rglob("*lock"))) == 1  # nobody removed it
    with lock(target):
        pass
    assert not list(tmp_path.rglob("*lock"))


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_lock_that_cannot_be_written_names_the_file_and_leaves_none(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=r"\.x\.lock") as caught, lock_output(tmp_path / "x"):
            pass
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    with lock_output(tmp_path / "x"):
        pass


def test_the_owner_of_an_output_removes_what_killed_writers_left(tmp_path: Path) -> None:
    left, other = tmp_path / ".x.abcdefgh.tmp", tmp_path / ".y.abcdefgh.tmp"
    left.mkdir()
    (left / "part").touch()
    other.touch()
    with lock_output(tmp_path / "x"):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [other]


def test_a_dead_lock_beside_a_finished_file_is_removed_and_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.2)
    file, lock = tmp_path / "a.npz", tmp_path / ".a.npz.lock"
    file.touch()
    remove_dead_lock(file)
    lock.write_text("{}")
    remove_dead_lock(file)
    assert entries(tmp_path) == [file]
    with lock_output(file):
        remove_dead_lock(file)
        assert lock.exists()


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with pytest.raises(InUseError, match=f"process {os.getpid()} on"), lock_folder(tmp_path):
            pass
        with pytest.raises(InUseError), lock_output(tmp_path):  # it is being filled
            pass
        assert (tmp_path / LOCK_NAME).is_file()
        (tmp_path / LOCK_NAME).read_bytes()  # reading and closing the file does not end the lock
        with pytest.raises(InUseError), lock_folder(tmp_path):
            pass


def _leave_the_lock() -> None:
    assert not locks._held
    os._exit(0)


def test_a_forked_child_neither_holds_nor_releases_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with lock_folder(tmp_path):
        child = context.Process(target=_leave_the_lock)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert (
            subprocess.run([sys.executable, "-c", HOLD, "folder", str(tmp_path)], capture_output=True).returncode == 1
        )
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:  # a child that outlives the lock
            os.read(read, 1)
            os._exit(0)
    with lock_folder(tmp_path):
        pass
    os.write(write, b"x")
    os.waitpid(pid, 0)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"host": 3}', b"\xff" * 9000])
def test_a_damaged_file_without_an_owner_is_taken_over(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.2)
    (tmp_path / LOCK_NAME).write_bytes(content)
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("has_flock", [True, False])
@pytest.mark.parametrize("is_alive", [True, False])
def test_the_lock_of_another_machine_counts_while_it_is_touched(
    has_flock: bool, is_alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """As on NFS without locks, where flock succeeds on each machine, or fails."""
    if not has_flock:
        request.getfixturevalue("no_flock")
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.3)
    path = tmp_path / LOCK_NAME
    write_lock(path, ELSEWHERE)
    if is_alive:
        times = iter(range(100))
        monkeypatch.setattr(locks, "_modified", lambda path: next(times))
        expected = r"in use by process 7 on elsewhere \(cogvideo train run_dir=x\)"
        with pytest.raises(InUseError, match=expected), lock_folder(tmp_path):
            pass
        assert json.loads(path.read_bytes()) == asdict(ELSEWHERE)
    else:
        with lock_folder(tmp_path):
            assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_without_flock_a_process_of_this_machine_is_looked_up(tmp_path: Path, no_flock: None) -> None:
    this, path = Owner.this_process(), tmp_path / LOCK_NAME
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = locks._start_of(other.pid)
    write_lock(path, replace(this, pid=other.pid, start=start))
    with pytest.raises(InUseError, match=f"process {other.pid}"), lock_folder(tmp_path):
        pass
    write_lock(path, replace(this, pid=other.pid, start=f"{start}0"))  # its number was used again
    with lock_folder(tmp_path):
        pass
    other.communicate(b"\n")
    write_lock(path, replace(this, pid=other.pid, start=start))
    with lock_folder(tmp_path):
        pass


def test_without_flock_the_last_of_two_writers_wins(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: write_lock(tmp_path / LOCK_NAME, ELSEWHERE))
    with pytest.raises(InUseError, match="process 7 on elsewhere"), lock_folder(tmp_path):
        pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), lock_folder(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "keep"


@pytest.mark.parametrize("call", ["open", "mkdir", "fsync", "unlink"])
@pytest.mark.parametrize("kind", ["folder", "output"])
def test_a_signal_while_it_is_taken_or_released_leaves_none(
    call: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "made" / "run", getattr(os, call)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        return result

    with signals_as_exceptions() as received:
        monkeypatch.setattr(os, call, interrupted)
        with pytest.raises(SystemExit), lock_folder(target) if kind == "folder" else lock_output(target):
            pass
        assert received == [signal.SIGTERM]
    assert not list(tmp_path.iterdir())
    assert not locks._held


class Interrupted(set[int]):
    """Notes descriptors, then a signal arrives."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call, self.seen = call, -1

    def add(self, descriptor: int) -> None:
        super().add(descriptor)
        self._arrive("add", descriptor)

    def discard(self, descriptor: int) -> None:
        super().discard(descriptor)
        self._arrive("discard", descriptor)

    def _arrive(self, call: str, descriptor: int) -> None:
        if call == self.call:
            self.call, self.seen = "", descriptor
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("call", ["add", "discard"])
def test_a_signal_while_a_lock_is_taken_over_or_given_up_closes_it_once(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """`add`: the file of a dead process was there. `discard`: without flock, another process wrote it last."""
    held = Interrupted(call)
    monkeypatch.setattr(locks, "_held", held)
    if call == "add":
        write_lock(tmp_path / LOCK_NAME, Owner.this_process())
    else:
        request.getfixturevalue("no_flock")
        monkeypatch.setattr(locks.time, "sleep", lambda seconds: write_lock(tmp_path / LOCK_NAME, ELSEWHERE))
    with signals_as_exceptions(), pytest.raises(SystemExit), lock_folder(tmp_path):
        pass
    assert not held and held.seen >= 0
    with pytest.raises(OSError):
        os.fstat(held.seen)
