"""Writing so that nothing half-made is ever seen, and reading small files of others with care.

Everything the package leaves on disk goes through `atomic_write` or `atomic_directory`: it is complete under its name,
or absent. Not here: formats (each belongs to the package that owns it).
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20
MAX_NAME_BYTES = 96
BUNDLED_WEIGHTS = Path(__file__).parent / "weights" / "tiny"
"""The bundle that ships with the package: a small model of moving digits."""


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, same suffix; on success it is flushed to disk and takes `path`'s place.

    On an exception the temporary file goes and whatever stood at `path` stays. Missing parent folders are made.
    Raises: OSError where the folder cannot be written; a disk that fills up names the file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected a place for a file")
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; on success it takes that name.

    An existing `path` is an error unless it is an empty folder or `replace` is set; then the old one goes last.
    Raises: FileExistsError; OSError where the parent cannot be written.
    """
    path = Path(path)
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; choose another name or remove it")
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        _swap_in(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path | str) -> list[Path]:
    """Remove what killed writers of `path` left beside it; returns what that was. None other may be at work on it."""
    path = Path(path)
    pattern = f".{glob.escape(path.stem[:32])}.*.tmp{glob.escape(path.suffix)}"
    found = sorted(path.parent.glob(pattern))
    for leftover in found:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return found


def _swap_in(new: Path, path: Path) -> None:
    """Rename `new` to `path`, moving a non-empty `path` aside first and back again should that fail."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        os.rename(new, path)
        return
    aside = _temporary_sibling(path)
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink()


def _temporary_sibling(path: Path) -> Path:
    """A free name in the same folder (so that a rename cannot cross file systems); makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = next(tempfile._get_candidate_names())  # type: ignore[attr-defined]
    return path.with_name(f".{path.stem[:32]}.{token}.tmp{path.suffix}")


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk; a file system that cannot sync folders is left alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256_file(path: Path | str) -> str:
    """The hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON with its keys in the order given, readable by people, atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file that anyone may have written.

    Raises: OSError if it cannot be opened; ValueError if it is larger than `max_bytes` or not JSON.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes} bytes, which is more than such a file should hold")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({str(error).partition(chr(10))[0]})") from None


def safe_name(text: str) -> str:
    """A file stem from any text: letters and digits of every script stay, all else becomes a dash; 96 bytes at most.

    Two texts may share a name; callers that write many files put a number before it.
    """
    kept = "".join(c if c.isalnum() else "-" for c in unicodedata.normalize("NFC", text))
    name = "-".join(filter(None, kept.split("-")))
    return name.encode("utf-8", "ignore")[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip("-") or "unnamed"
