"""Frees disk space and memory: removes the oldest results and uploads, and returns freed memory to the system."""

import ctypes
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from cogvideo.locks import entries

M_ARENA_MAX = -8
"""A parameter of glibc's mallopt, from malloc.h."""


def size_of(path: Path) -> int:
    """Bytes that a file or folder takes on disk; what disappears meanwhile counts as nothing."""
    total = 0
    with suppress(OSError):
        status = path.lstat()
        total = status.st_blocks * 512
        if path.is_dir() and not path.is_symlink():
            total += sum(size_of(entry) for entry in path.iterdir())
    return total


def remove_oldest(folder: Path, limit: int, keep: Collection[Path] = ()) -> list[Path]:
    """Remove the oldest entries of a folder until they take at most `limit` bytes; returns those removed.

    Entries in `keep` stay. A folder is as old as the last change in it.
    """
    sizes: dict[Path, int] = {}
    ages: dict[Path, float] = {}
    for path in entries(folder):
        with suppress(OSError):
            ages[path], sizes[path] = path.lstat().st_mtime, size_of(path)
    total, removed = sum(sizes.values()), []
    for path in sorted(ages, key=lambda path: (ages[path], path.name)):
        if total <= limit:
            break
        if path in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
        if not os.path.lexists(path):
            total -= sizes[path]
            removed.append(path)
    return removed


def limit_arenas() -> None:
    """Make all threads share two glibc arenas; by default each new thread may get its own, which is kept."""
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_ARENA_MAX, 2)


def release_memory() -> None:
    """Return freed memory to the system; glibc's free() keeps most of it."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None)
