"""Atomic writes of files and folders, safe file names, and reading untrusted JSON."""

import errno
import hashlib
import os
import signal
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict

from cogvideo.files import (
    Count,
    atomic_directory,
    atomic_write,
    open_npy,
    parse_json,
    read_json,
    read_npz,
    remove_all_leftovers,
    remove_leftovers,
    safe_name,
    sha256_file,
    torch_errors_as_os_errors,
    write_json,
    write_npy,
)
from cogvideo.interrupts import signals_as_exceptions


class Shape(TypedDict):
    rows: Count
    names: NotRequired[list[str]]


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


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="appeared"), atomic_directory(tmp_path / "folder"):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").touch()
    with pytest.raises(FileExistsError, match="appeared"), atomic_directory(tmp_path / "file"):
        (tmp_path / "file").touch()
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["theirs"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_link_is_written_through(replace: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    link.symlink_to(target)
    if replace:
        target.mkdir(parents=True)
        (target / "old").touch()
    with atomic_directory(link, replace=replace) as temporary:
        (temporary / "new").touch()
    assert link.is_symlink() and names(target) == ["new"] and names(tmp_path / "disk") == ["target"]


def test_a_link_to_itself_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(OSError, match="link"), atomic_directory(tmp_path / "link"):
        pytest.fail("nothing can be written there")


def leave_temporary(path: Path) -> Path:
    """What a process that is killed while it writes `path` leaves: it runs no `finally`."""
    with atomic_write(path) as temporary:
        temporary.touch()
    path.unlink()
    temporary.touch()
    return temporary


def test_leftovers_of_killed_writers_are_removed_and_no_others(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.json", tmp_path / "a"
    others = [tmp_path / name for name in ("b.json", "a.b.json", "a.b", "ab", "a.txt")]
    left, kept = [leave_temporary(path) for path in (file, folder)], [leave_temporary(path) for path in others]
    kept.append(tmp_path / ".a.notes.tmp.json")
    kept[-1].touch()
    assert remove_leftovers(file) == left[:1] and remove_leftovers(folder) == left[1:]
    assert names(tmp_path) == sorted(path.name for path in kept)
    assert remove_all_leftovers(tmp_path) == sorted(kept[:-1])
    assert names(tmp_path) == [".a.notes.tmp.json"]


def test_long_names_do_not_share_their_leftovers(tmp_path: Path) -> None:
    """Or the writer of one file would remove what another process is writing."""
    one, two = (tmp_path / f"{'x' * 60}{end}" for end in "ab")
    left = leave_temporary(two)
    assert remove_leftovers(one) == [] and left.exists()
    assert remove_leftovers(two) == [left]


def test_a_file_that_torch_cannot_open_is_an_os_error_that_names_it(tmp_path: Path) -> None:
    none = tmp_path / "none.bin"
    with pytest.raises(FileNotFoundError) as caught, torch_errors_as_os_errors():
        torch.from_file(str(none), size=1)
    assert caught.value.filename == str(none)
    with pytest.raises(RuntimeError, match="shape"), torch_errors_as_os_errors():
        torch.zeros(2).reshape(3)


@given(st.binary(max_size=5000))
def test_sha256_is_that_of_the_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("sha") / "file"
    path.write_bytes(data)
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"\xff\xfe\xfa", b'{"a": 1} x', b"[" * 100_000, b"1" * 5000),
        *(b'"\xed\xa0\x80"', '{"a": "数字"}'.encode("utf-16"), '"\\ud800"'.encode("utf-16-le")),
    ],
)
def test_bad_json_is_one_line_with_the_files_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json is damaged: not readable as JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x.json") == {"a": 1}


def test_oversized_json_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" + "1," * 100 + "1]")
    with pytest.raises(ValueError, match="larger than 50 bytes"):
        read_json(path, max_bytes=50)
    assert len(read_json(path)) == 101


@pytest.mark.parametrize("value", ["[],", "1,"])
def test_json_of_very_many_values_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """A few bytes of text can become twenty times as many of objects."""
    monkeypatch.setattr("cogvideo.files.json", None)  # nothing is parsed
    (tmp_path / "x.json").write_text("[" + value * (1 << (21 if "[" in value else 23)) + "0]")
    with pytest.raises(ValueError, match=r"x\.json has \d+ commas and \d+ brackets; expected"):
        read_json(tmp_path / "x.json")


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows": NaN}', "NaN is not a finite number"),
        ('{"rows": 1e999}', "1e999 is not finite"),
        ('{"rows": 1' + "0" * 30 + "}", "has 31 digits"),
        ('{"rows": ' + "[" * 40 + "]" * 40 + "}", "nested more than 32 deep"),
        ('{"rows": 1, "rows": 2}', "'rows' occurs twice"),
        ('{"rows": 1, "a": "\\ud800"}', "contains a lone surrogate"),
        ("[]", "its value: should be a valid dictionary"),
        ("{}", "rows: field required"),
        ('{"rows": true}', "rows: should be a valid integer, got True"),
        ('{"rows": 1.0}', "rows: should be a valid integer"),
        ('{"rows": -1}', "rows: should be greater than or equal to 0, got -1"),
        ('{"rows": 9007199254740993}', "rows: should be less than or equal to"),
        ('{"rows": 1, "names": ["a", ["b"]]}', r"names.1: should be a valid string, got \['b'\]"),
    ],
)
def test_json_of_another_shape_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json is damaged: .*{message}") as caught:
        read_json(path, Shape)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json_keeps_keys_that_it_does_not_know(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"rows": 3, "new": [1]})
    assert read_json(tmp_path / "x.json", Shape) == {"rows": 3, "new": [1]}
    assert parse_json(b"[NaN]", "x", allow_nan=True)[0] != 1


def npy(header: str, data: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return magic + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            npy("{'descr': '<u2', 'fortran_order': False, 'shape': (40000000000000,), }"),
            "its header says 80000000000128",
        ),
        (npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }"), r"of shape \[-1\]"),
        (
            npy("{'descr': '<u2', 'fortran_order': False, 'shape': (2, 1), }", bytes(4)),
            r"expected uint16 of shape \[any\]",
        ),
        (npy("{'descr': '>u2', 'fortran_order': False, 'shape': (2,), }", bytes(4)), "holds >u2 of shape"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", bytes(16)), "holds object"),
        (npy("{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (2,), }", bytes(4)), "of shape"),
        (npy("{'descr': '<u2', 'fortran_order': True, 'shape': (2,), }", bytes(4)), "in column-major order"),
        (npy("{'descr': '<u2', 'fortran_order': False, 'shape': (2,), }", bytes(5)), "cut short or damaged"),
        (npy("[" * 3000), "not a readable"),
        (npy("{'descr': '<u2'}"), "not a readable"),
        (npy("{}", magic=b"\x93NUMPY\x09\x00"), "not a readable"),
        (b"PK\x03\x04", "not a readable"),
        (b"", "not a readable"),
    ],
)
def test_a_forged_array_is_refused_before_anything_is_allocated(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        open_npy(path, "<u2", (None,))
    assert "x.npy" in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_are_read_back(tmp_path: Path) -> None:
    array = np.arange(6, dtype="<u2").reshape(3, 2)
    write_npy(tmp_path / "a.npy", array)
    with open(tmp_path / "b.npy", "wb") as file:
        np.save(file, array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert np.array_equal(open_npy(tmp_path / "a.npy", ("<i4", "<u2"), (None, 2)), array)
    write_npy(tmp_path / "empty.npy", array[:0])
    assert open_npy(tmp_path / "empty.npy", "<u2", (None, 2)).shape == (0, 2)
    np.savez_compressed(tmp_path / "c.npz", a=array, b=np.array("text"))
    arrays = read_npz(tmp_path / "c.npz")
    assert np.array_equal(arrays["a"], array) and str(arrays["b"]) == "text"


def test_a_hostile_npz_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(10**6))
    with pytest.raises(ValueError, match=r"bomb\.npz is damaged: it unpacks to more than"):
        read_npz(tmp_path / "bomb.npz", max_bytes=1000)
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="holds object"):
        read_npz(tmp_path / "pickle.npz")
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("a.npy", npy("{'descr': '<u2', 'fortran_order': False, 'shape': (40000000000000,), }"))
    with pytest.raises(ValueError, match="its header says"):
        read_npz(tmp_path / "huge.npz")
    (tmp_path / "none.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is damaged"):
        read_npz(tmp_path / "none.npz")


def test_numpys_own_loss_of_the_reason_does_not_happen(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError) as caught:
        write_npy("/dev/full", np.zeros(10**6))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"


def test_a_signal_after_the_temporary_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def make_and_interrupt(path: Path, *args: Any, **kwargs: Any) -> None:
        make(path, *args, **kwargs)
        if path.suffix == ".tmp":
            raise SystemExit(143)

    monkeypatch.setattr(Path, "mkdir", make_and_interrupt)
    with pytest.raises(SystemExit), atomic_directory(tmp_path / "target"):
        pass
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging two names is Linux's")
def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that at no time, whatever kills the process, nothing has its name."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    monkeypatch.setattr(os, "rename", None)
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "new").touch()
    assert names(target) == ["new"] and names(tmp_path) == ["target"]


@pytest.mark.parametrize("call", ["rename", "rmdir"])
def test_a_signal_while_a_folder_is_replaced_leaves_the_new_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not between the two renames, when nothing has its name, nor with half of the old one beside it."""
    monkeypatch.setattr("cogvideo.files._exchange", lambda *names: False)  # as where the system cannot
    target, real = tmp_path / "target", getattr(os, call)
    target.mkdir()
    (target / "old").touch()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)

    with signals_as_exceptions() as received:
        with pytest.raises(SystemExit) as caught, atomic_directory(target, replace=True) as temporary:
            (temporary / "new").touch()
            monkeypatch.setattr(os, call, interrupted)
        assert caught.value.code == 143 and received == [signal.SIGTERM]
    assert names(target) == ["new"] and names(tmp_path) == ["target"]


def test_json_of_very_many_names_is_refused(monkeypatch):
    monkeypatch.setattr("cogvideo.files.MAX_NAMES", 3)
    assert parse_json(b'{"a": 1, "b": 2, "c": 3}', "x.json") == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(ValueError, match=r"x\.json has 4 colons; expected JSON with at most 3 keys"):
        parse_json(b'{"a": 1, "b": 2, "c": 3, "d": 4}', "x.json")
