"""Atomic writes of files and folders, safe file names, and reading untrusted JSON."""

import hashlib
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.files import (
    atomic_directory,
    atomic_write,
    read_json,
    remove_leftovers,
    safe_name,
    sha256_file,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_makes_folders_and_keeps_the_suffix(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "clip.mp4"
    with atomic_write(target) as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == target.parent and not target.exists()
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new" and names(target.parent) == ["clip.mp4"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and names(tmp_path) == ["file.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    with pytest.raises(OSError, match=r"No space left on device.*clip\.mp4"), atomic_write(target):
        Path("/dev/full").write_bytes(b"frames")
    assert not list(tmp_path.iterdir())


def test_a_long_chinese_name_still_has_room_for_the_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / ("数" * 80 + ".json")
    write_json(target, {"字": 1})
    assert read_json(target) == {"字": 1}


def test_a_folder_cannot_be_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="expected the path of a file"), atomic_write(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OSError), atomic_write(tmp_path / "file" / "below"):
        pass


def test_atomic_directory_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "x" and names(tmp_path) == ["target"]


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "target") as temporary:
        (temporary / "x").touch()
        raise RuntimeError
    assert names(tmp_path) == []


def test_an_existing_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with atomic_directory(target) as temporary:  # empty: nothing to lose
        (temporary / "old").touch()
    with pytest.raises(FileExistsError, match="choose another name"), atomic_directory(target):
        pass
    with pytest.raises(RuntimeError), atomic_directory(target, replace=True):
        raise RuntimeError
    assert names(target) == ["old"]
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "new").touch()
    assert names(target) == ["new"] and names(tmp_path) == ["target"]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    file, folder, other = tmp_path / "a.json", tmp_path / "a", tmp_path / "b.json"
    for path in (file, folder, other):  # a killed process runs no `finally`: its temporary stays
        with atomic_write(path) as temporary:
            (tmp_path / temporary.name.replace(".tmp", "x.tmp")).touch()
            temporary.touch()
    assert len(names(tmp_path)) == 6
    assert len(remove_leftovers(file)) == len(remove_leftovers(folder)) == 1
    assert file.exists() and folder.exists() and len(names(tmp_path)) == 4


@given(st.binary(max_size=5000))
def test_sha256_is_that_of_the_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("sha") / "file"
    path.write_bytes(data)
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\xfa", b'{"a": 1} x', b"[" * 100_000, b"1" * 5000])
def test_bad_json_is_one_line_with_the_files_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json is damaged: not readable as JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_oversized_json_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" + "1," * 100 + "1]")
    with pytest.raises(ValueError, match="larger than 50 bytes"):
        read_json(path, max_bytes=50)
    assert len(read_json(path)) == 101


@given(st.text())
def test_a_safe_name_is_a_single_path_component(text: str) -> None:
    name = safe_name(text)
    assert 0 < len(os.fsencode(name)) <= 96
    assert all(c.isalnum() or c == "-" for c in name) and not name.startswith("-")
    assert safe_name(name) == name


@given(st.text(st.characters(categories=("Lo", "Nd")), min_size=1, max_size=20))
def test_a_safe_name_keeps_letters_of_every_script(text: str) -> None:
    normalized = unicodedata.normalize("NFC", text)
    if all(c.isalnum() for c in normalized) and len(normalized.encode()) <= 96:
        assert safe_name(text) == normalized


def test_safe_names_by_example() -> None:
    assert safe_name("the red digit 3, left!") == "the-red-digit-3-left"
    assert safe_name("红色的数字3向左快速移动") == "红色的数字3向左快速移动"
    assert safe_name("../../etc/passwd; rm -rf $HOME\x00") == "etc-passwd-rm-rf-HOME"
    assert safe_name("...") == safe_name("") == "unnamed"
