"""One writer at a time: locks, across processes and machines, on folders and files that a command writes.

A lock is a file: `.lock` in a folder that is filled in place, `.NAME.lock` beside a file or folder that appears only
when complete. Its owner holds `flock` on it, records itself in it, and touches it every ten seconds.

- Where the file system supports `flock` (local disks; NFS since Linux 2.6.12, as a byte-range lock at the server), the
  kernel decides: there are never two owners, and a lock ends with its process, however that ends. After a crash of an
  NFS client the server frees the lock once the client's lease has expired.
- Some file systems accept `flock` but apply it on one machine only (NFS with `nolock` or `local_lock`, many in user
  space). So a lock file from another machine is watched for a minute: if it is touched meanwhile, it has an owner.
- Where `flock` is refused, the file alone decides: on the same machine by whether its process runs, otherwise by
  whether it is touched. Two commands that start within the same second exclude each other only if they see each
  other's writes within a second.

A forked child does not hold its parent's lock. The file is removed at the end; one left by a crash is taken over.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideo.files import disk_errors_name, parse_json, remove_leftovers
from cogvideo.interrupts import postponed_signals
from cogvideo.logs import get_logger

if TYPE_CHECKING:
    from cogvideo.distributed import ProcessGroup

LOCK_NAME = ".lock"
HEARTBEAT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
"""How long another machine's lock file is watched; NFS clients may see a touch this late."""
SETTLE_SECONDS = 1.0
"""Without flock: how long to wait after writing the file before checking whether another process wrote it too."""
MAX_BYTES = 4096
MAX_COMMAND = 200
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""Errors from file systems that do not support locks."""

_held: set[int] = set()
"""File descriptors of the locks that this process holds."""


class InUseError(ValueError):
    """Another process is writing the folder or file; the message says which process."""


@dataclass(frozen=True)
class Owner:
    """A process, as recorded in a lock file."""

    host: str = ""
    pid: int = 0
    start: str = ""
    """When the process started, in kernel clock ticks: process ids are reused."""
    boot: str = ""
    """Id of the running kernel, the same in all containers of a machine."""
    pid_namespace: str = ""
    command: str = ""

    @classmethod
    def this_process(cls) -> "Owner":
        words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else ["python"]
        return cls(
            socket.gethostname(),
            os.getpid(),
            _start_of(os.getpid()),
            _read_text("/proc/sys/kernel/random/boot_id"),
            _pid_namespace(),
            " ".join(words)[:MAX_COMMAND],
        )

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        return _printable(f"process {self.pid} on {self.host} ({self.command})")

    def is_on_this_machine(self) -> bool:
        """Whether the owner runs, or ran before a reboot, on this machine."""
        return self.boot == _read_text("/proc/sys/kernel/random/boot_id") or self.host == socket.gethostname()

    def is_running_here(self) -> bool | None:
        """Whether the process still runs; None if that cannot be determined from here."""
        if self.boot != _read_text("/proc/sys/kernel/random/boot_id") or self.pid_namespace != _pid_namespace():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            pass
        return _start_of(self.pid) == self.start


@contextlib.contextmanager
def lock_folder(folder: Path | str, processes: "ProcessGroup | None" = None) -> Iterator[None]:
    """Hold the lock of a folder that is filled in place; a missing one is created, and removed if it stays empty.

    With `processes`, rank 0 takes the lock for all of them.
    Raises: InUseError if another process holds it (on rank 0; the others exit with code 2); OSError if the folder is
    not writable.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        yield  # not a folder: the command reports it
        return
    with _held_for_job(_Lock(folder / LOCK_NAME, folder), processes):
        yield


@contextlib.contextmanager
def lock_output(path: Path | str) -> Iterator[None]:
    """Hold the lock of a file or folder that appears only when complete; remove what killed writers of it left.

    Raises: InUseError if another process is writing it, or filling the folder of that name in place; OSError.
    """
    path = Path(path).absolute()
    with _held_for_job(_Lock(_lock_path(path), path), None):
        if (path / LOCK_NAME).exists():
            with lock_folder(path):
                pass
        for leftover in remove_leftovers(path):
            get_logger(__name__).info("removed %s, left by an interrupted run", leftover)
        yield


def remove_dead_lock(path: Path | str) -> None:
    """Remove the lock of a finished file if a killed process left it."""
    path = Path(path).absolute()
    if _lock_path(path).exists():
        with contextlib.suppress(InUseError), lock_output(path):
            pass


def _lock_path(path: Path) -> Path:
    """The lock file of a file or folder that appears only when complete."""
    return path.with_name(f".{path.name}{LOCK_NAME}")


def entries(folder: Path) -> list[Path]:
    """The entries of a folder except its lock."""
    return [path for path in folder.iterdir() if path.name != LOCK_NAME]


@contextlib.contextmanager
def _held_for_job(lock: "_Lock", processes: "ProcessGroup | None") -> Iterator[None]:
    try:
        if processes is None:
            lock.acquire()
        else:
            processes.broadcast_from_rank_0(lock.acquire)
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, path: Path, target: Path) -> None:
        """`target`: what is locked, for messages."""
        self._path, self._target = path, target
        self._descriptor: int | None = None
        self._created: list[Path] = []
        self._folder_times: tuple[os.stat_result, os.stat_result] | None = None
        """The folder's status before and after the lock file was created in it."""
        self._ended = threading.Event()
        self._owner = Owner.this_process()

    def acquire(self) -> bool:
        """Take the lock. Raises: InUseError, OSError; `release` must be called even then."""
        with postponed_signals():
            self._created = _make_folder(self._path.parent)
        before = self._path.parent.stat()
        self._open_and_lock()
        self._folder_times = before, self._path.parent.stat()
        threading.Thread(target=self._touch_regularly, args=(self._descriptor,), daemon=True).start()
        return True

    def release(self) -> None:
        """Remove the file, free the lock, and remove folders created for it; do nothing in a forked child."""
        if self._owner.pid != os.getpid():
            return
        with postponed_signals():
            self._ended.set()
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                self._let_go(descriptor)
            _remove_empty(self._created)

    def _let_go(self, descriptor: int) -> None:
        with contextlib.suppress(OSError):
            if _is_same_file(descriptor, self._path):
                now = self._path.parent.stat()
                self._path.unlink()  # before the lock ends, or it could be the next owner's
                if self._folder_times is not None and now.st_mtime_ns == self._folder_times[1].st_mtime_ns:
                    # nothing else changed, for example because the command was refused: leave no trace
                    times = self._folder_times[0]
                    os.utime(self._path.parent, ns=(times.st_atime_ns, times.st_mtime_ns))
        self._close(descriptor)

    def _open_and_lock(self) -> None:
        """Take the lock and record its owner. `_descriptor` is set once the file is ours, for `release` to remove."""
        while self._descriptor is None:
            with contextlib.ExitStack() as unless_ours:
                with postponed_signals():
                    # writable, which NFS requires; never through a link
                    descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                    unless_ours.callback(os.close, descriptor)
                    has_flock = self._flock(descriptor)
                    if has_flock and not _is_same_file(descriptor, self._path):
                        continue  # its owner removed it meanwhile
                    before = _read_owner(self._path)
                    if before is None:
                        self._keep(descriptor, unless_ours)
                if before is not None:
                    if self._is_alive(before, has_flock):
                        raise self._in_use(before)
                    with postponed_signals():
                        self._keep(descriptor, unless_ours)
        text = json.dumps(asdict(self._owner), ensure_ascii=False).encode()
        with disk_errors_name(self._path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text, 0)
            os.fsync(descriptor)
        if not has_flock:
            time.sleep(SETTLE_SECONDS)
            if (after := _read_owner(self._path)) != self._owner:
                with postponed_signals():
                    self._descriptor = None
                    self._close(descriptor)
                raise self._in_use(after)

    def _keep(self, descriptor: int, unless_ours: contextlib.ExitStack) -> None:
        """Make the descriptor ours. Call with signals postponed: an interrupt in between would close it twice."""
        self._descriptor = descriptor
        _held.add(descriptor)
        unless_ours.pop_all()

    def _close(self, descriptor: int) -> None:
        _held.discard(descriptor)
        os.close(descriptor)

    def _flock(self, descriptor: int) -> bool:
        """Take the kernel's lock; False if the file system has none. Raises: InUseError."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise self._in_use(_wait_for_owner(self._path)) from None
        return True

    def _is_alive(self, owner: Owner, has_flock: bool) -> bool:
        """Whether the process named in the file still holds the lock, although the kernel does not report it."""
        if has_flock and owner.is_on_this_machine():
            return False
        running = None if has_flock else owner.is_running_here()
        if running is not None:
            return running
        message = "%s is locked by %s; waiting up to %.0f s to see whether that process is still running"
        get_logger(__name__).info(message, self._target, owner, PATIENCE_SECONDS)
        return _is_touched(self._path, PATIENCE_SECONDS)

    def _in_use(self, owner: Owner | None) -> InUseError:
        advice = "wait until it ends, or choose another folder"
        return InUseError(f"{self._target} is in use by {owner or Owner()}; {advice}")

    def _touch_regularly(self, descriptor: int) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                if _is_same_file(descriptor, self._path):
                    os.utime(self._path)


def _forget_in_child() -> None:
    """Close a forked child's copies of the descriptors, which would hold the lock after the parent has ended."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _make_folder(folder: Path) -> list[Path]:
    """Create a folder and its parents; returns those that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _read_owner(path: Path) -> Owner | None:
    """The owner that a lock file names; None if it is empty or gone, an unknown owner if it is damaged."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES)
        if not data:
            return None
        value = parse_json(data, path)
        return Owner(**value) if isinstance(value, dict) and _fits(value) else Owner()
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return Owner()


def _fits(value: dict[str, object]) -> bool:
    return value.keys() == asdict(Owner()).keys() and all(type(value[k]) is type(v) for k, v in asdict(Owner()).items())


def _wait_for_owner(path: Path) -> Owner | None:
    """The owner, which records itself in the file only just after taking the lock; None if it takes over a second."""
    for _ in range(20):
        if (owner := _read_owner(path)) is not None:
            return owner
        time.sleep(0.05)
    return None


def _is_touched(path: Path, seconds: float) -> bool:
    """Whether a file is modified within `seconds`, without comparing clocks."""
    deadline, before = time.monotonic() + seconds, _modified(path)
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 10))
        if (now := _modified(path)) != before:
            return now is not None  # None: its owner removed it
    return False


def _modified(path: Path) -> int | None:
    """The modification time, as the server has it: opening a file makes an NFS client revalidate its cache."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _start_of(pid: int) -> str:
    """The start of a process in clock ticks since boot; empty where there is no /proc."""
    return (_read_text(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""] * 20)[19]


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_BYTES).strip()
    except OSError:
        return ""


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
