"""Atomic writes, hashes, and reading small files that are not trusted.

Everything the package writes goes through `atomic_write` or `atomic_directory`: under its name it is complete or
absent. Not here: file formats (each package has its own).
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
    """Yield a temporary path in the same folder, with the same suffix; on success it is synced and replaces `path`.

    On an exception the temporary file is removed and `path` is left as it was. Missing parent folders are created.
    Raises: OSError if the folder cannot be written; if the disk is full, the error names `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the path of a file")
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
    """Yield a new temporary folder in the same parent; on success it is renamed to `path`.

    An existing `path` is an error unless it is an empty folder or `replace` is set; with `replace` the old folder is
    removed last. Raises: FileExistsError; OSError if the parent cannot be written.
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
    """Remove temporary files that killed writers of `path` left, and return them. No other writer may be running."""
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
    """Rename `new` to `path`, moving an existing `path` aside first, and back again if the rename fails."""
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
    """A free name in the same folder (a rename must not cross file systems); creates the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = next(tempfile._get_candidate_names())  # type: ignore[attr-defined]
    return path.with_name(f".{path.stem[:32]}.{token}.tmp{path.suffix}")


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk. Errors for folders are ignored: not all file systems sync them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256_file(path: Path | str) -> str:
    """The hex SHA-256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Write indented JSON atomically, keys in the order given."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file that is not trusted.

    Raises: OSError if it cannot be opened; ValueError if it is larger than `max_bytes` or not JSON.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes} bytes; expected a small JSON file")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({str(error).partition(chr(10))[0]})") from None


def safe_name(text: str) -> str:
    """A file stem from any text, at most 96 bytes: letters and digits of all scripts stay, the rest become dashes.

    Two texts may have the same name, so callers that write many files prefix a number.
    """
    dashed = "".join(c if c.isalnum() else "-" for c in unicodedata.normalize("NFC", text))
    name = "-".join(filter(None, dashed.split("-")))
    return name.encode("utf-8", "ignore")[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip("-") or "unnamed"
