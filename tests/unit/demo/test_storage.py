"""The oldest results go first, and only as many as must."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvideo.demo import storage
from cogvideo.demo.storage import M_ARENA_MAX, limit_arenas, release_memory, remove_oldest, size_of
from cogvideo.locks import LOCK_NAME


def write(folder: Path, name: str, age: int, size: int = 100_000) -> Path:
    path = folder / name
    path.mkdir()
    (path / "clip.mp4").write_bytes(os.urandom(size))
    os.utime(path, (age, age))
    return path


def test_the_oldest_go_first(tmp_path: Path) -> None:
    running, old, middle, new = (write(tmp_path, name, age) for age, name in enumerate(("running", "a", "b", "c")))
    (tmp_path / LOCK_NAME).write_text("mine")
    assert remove_oldest(tmp_path, size_of(tmp_path)) == []
    assert remove_oldest(tmp_path, 2 * size_of(old), keep=[running]) == [old, middle]
    assert {path.name for path in tmp_path.iterdir()} == {"running", "c", LOCK_NAME}
    assert remove_oldest(tmp_path, 0, keep=[running]) == [new] and running.exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path, "outside", 0)
    results = tmp_path / "results"
    results.mkdir()
    (results / "link").symlink_to(outside)
    (results / "file").write_bytes(b"x" * 5000)
    assert size_of(results / "link") < 5000
    remove_oldest(results, 0)
    assert list(results.iterdir()) == [] and (outside / "clip.mp4").exists()


@pytest.mark.parametrize("has_glibc", [True, False])
def test_glibc_is_asked_where_there_is_one(has_glibc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[tuple[str, ...]]()

    def of_glibc(name: str) -> Callable[..., int] | None:
        return (lambda *numbers: calls.append((name, *numbers)) or 1) if has_glibc else None

    monkeypatch.setattr(storage, "_of_glibc", of_glibc)
    limit_arenas()
    release_memory()
    assert calls == ([("mallopt", M_ARENA_MAX, 2), ("malloc_trim", 0)] if has_glibc else [])


def test_the_allocator_can_be_asked_anywhere() -> None:
    limit_arenas()
    release_memory()
    assert storage._of_glibc("no_such_function") is None
