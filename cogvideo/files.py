"""Atomic writes, hashes, and reading of untrusted JSON and NPY files.

Everything the package writes goes through `atomic_write` or `atomic_directory`: a file or folder under its final name
is complete. All JSON, NPY and NPZ files are read by `read_json`, `open_npy` and `read_npz`, which check sizes before
contents, and then every value. The expected form of a JSON file is given as a type, such as a `TypedDict` of
`typing_extensions`, and checked strictly by pydantic: 1.0 and True are not integers, text is not a number. Unknown keys
are allowed, because newer versions may have added them. Not here: file formats (each package has its own), safetensors
headers (`tensor_file.py`), torch.save's files (`torch_archive.py`).
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import io
import json
import math
import os
import re
import reprlib
import shutil
import stat
import tempfile
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, BinaryIO

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import DTypeLike, NDArray

from cogvideo.interrupts import postponed_signals

MAX_JSON_BYTES = 64 << 20
MAX_NAMES = 1 << 20
"""Most object keys in a JSON file; each takes 250 bytes of memory."""
MAX_VALUES = 1 << 22
"""Most values in a JSON file, at most a quarter of them lists and objects: an empty list is three bytes of text, but 64
in memory."""
MAX_DEPTH = 32
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escaped surrogate in JSON: one half of a valid pair, or a lone one, which is not valid Unicode."""
MAX_DIGITS = 20
"""Most digits of an integer: enough for 64 bits."""
MAX_NPY_HEADER_BYTES = 4096
MAX_NPZ_BYTES = 64 << 20
LARGEST = 2**53
"""The largest count that a file may claim."""
Count = Annotated[int, Ge(0), Le(LARGEST)]
MAX_NAME_BYTES = 96
MAX_TEMPORARY_STEM = 32
TEMPORARY = re.compile(r"\..*\.[a-z0-9_]{8}\.tmp(\.[^.]+)?", re.DOTALL)
"""Temporary names that `atomic_write` and `atomic_directory` use; a killed process leaves such files behind."""
TORCH_FILE_ERROR = re.compile(r"unable to .*file <(?P<name>.*)>.*\((?P<number>\d+)\)")
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Constants of renameat2(2)."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
BUNDLED_WEIGHTS = Path(__file__).parent / "weights" / "tiny"
"""The bundle that ships with the package: a small model of moving digits."""


@contextlib.contextmanager
def disk_errors_name(path: Path | str, temporary: Path | str = "") -> Iterator[None]:
    """Make disk errors name the file being written, with `path` in place of its `temporary` name."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS or (error.filename and not temporary):
            raise
        name = str(error.filename or path).removeprefix("file:")  # as FFmpeg writes it
        name = name.replace(str(temporary) or "\0", str(path))
        raise OSError(error.errno, os.strerror(error.errno), name) from error


@contextlib.contextmanager
def torch_errors_as_os_errors() -> Iterator[None]:
    """Turn torch's file errors, which are RuntimeErrors with the errno in their text, into OSErrors."""
    try:
        yield
    except RuntimeError as error:
        if (found := TORCH_FILE_ERROR.match(str(error))) is None:
            raise
        number = int(found["number"])
        raise OSError(number, os.strerror(number), found["name"]) from error


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder, with the same suffix; on success it is synced and replaces `path`.

    On an exception the temporary file is removed and `path` is left as it was. Missing parent folders are created.
    Raises: OSError if the folder cannot be written; disk errors name `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the path of a file")
    temporary = _temporary_sibling(path)
    try:
        with disk_errors_name(path, temporary):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder in the same parent; on success it is renamed to `path`.

    An existing `path` is an error unless it is an empty folder or `replace` is set; with `replace` the old folder is
    removed last. If `path` is a symbolic link, its target is written. Raises: FileExistsError, also if a folder has
    appeared there meanwhile; OSError if the parent cannot be written.
    """
    path = Path(path)
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; choose another name")
    path = _behind_links(path)
    temporary = _temporary_sibling(path)
    try:
        temporary.mkdir()
        with disk_errors_name(path, temporary):
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            _sync(temporary)
            if replace:
                swap_in(temporary, path)
            else:
                _rename_to_free_name(temporary, path)
            _sync(path.parent)
    finally:
        with postponed_signals():
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path | str) -> list[Path]:
    """Remove and return the temporary files that killed writers of `path` left. No other writer may be running."""
    path = Path(path)
    pattern = f".{glob.escape(_temporary_stem(path))}.{'?' * 8}.tmp{glob.escape(path.suffix)}"
    return _remove(leftover for leftover in sorted(path.parent.glob(pattern)) if is_temporary(leftover))


def remove_all_leftovers(folder: Path | str) -> list[Path]:
    """Remove and return the temporary files that killed writers left in `folder`, but not in its subfolders."""
    return _remove(path for path in sorted(Path(folder).glob(".*")) if is_temporary(path))


def is_temporary(path: Path) -> bool:
    """Whether `path` is a file or folder that is being written, or was when its process was killed."""
    return TEMPORARY.fullmatch(path.name) is not None


def _remove(leftovers: Iterable[Path]) -> list[Path]:
    found = list(leftovers)
    for leftover in found:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return found


def _behind_links(path: Path) -> Path:
    """The target of a symbolic link, existing or not; any other path as it is. Raises: OSError for a loop of links."""
    if not path.is_symlink():
        return path
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return found


def _rename_to_free_name(new: Path, path: Path) -> None:
    """Rename a folder to a name that is free or an empty folder's. Raises: FileExistsError, with nothing changed."""
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(f"{path} appeared while it was being written; choose another name") from None


def swap_in(new: Path, path: Path) -> None:
    """Rename `new` to `path`, in one step where the system can exchange two names, and remove the old `path`.

    Elsewhere the old one is moved aside first, and back again if the rename fails.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        os.rename(new, path)
        return
    aside = _temporary_sibling(path)
    with postponed_signals():
        if _exchange(new, path):
            aside = new
        else:
            os.rename(path, aside)
            try:
                os.rename(new, path)
            except OSError:
                os.rename(aside, path)
                raise
        _remove([aside])


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False if the system (not Linux) or the file system (NFS) cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    return renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def _temporary_sibling(path: Path) -> Path:
    """A free name in the same folder (a rename must not cross file systems); creates the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = next(tempfile._get_candidate_names())  # type: ignore[attr-defined]
    return path.with_name(f".{_temporary_stem(path)}.{token}.tmp{path.suffix}")


def _temporary_stem(path: Path) -> str:
    """The stem; long ones are cut and get a hash, so that they stay distinct."""
    stem = path.stem
    if len(stem) <= MAX_TEMPORARY_STEM:
        return stem
    return f"{stem[: MAX_TEMPORARY_STEM - 9]}-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}"


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


def write_npy(path: Path | str, array: NDArray[Any]) -> None:
    """Like `np.save`, which loses the reason for a failed write, such as a full disk."""
    with disk_errors_name(path), open(path, "wb") as file:
        np.lib.format.write_array(SimpleNamespace(write=file.write), array, allow_pickle=False)


def sha256_file(path: Path | str) -> str:
    """The hex SHA-256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Write indented JSON atomically, keys in the order given."""
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def code_cache() -> Path:
    """The folder for compiled code that later runs load, in the user's cache folder; it is created if it is missing.

    It is made private to the user, because whoever can write there can run code as the user. Raises: OSError if that
    is impossible.
    """
    folder = (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cogvideo").resolve()
    if not folder.is_dir():
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    if folder.stat().st_uid == os.geteuid() and not is_private(folder):
        folder.chmod(0o700)
    if not is_private(folder):
        raise PermissionError(f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    for parent in folder.parents:
        if parent.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            raise PermissionError(f"everybody can write to {parent}; set XDG_CACHE_HOME to a folder of your own")
    return folder


def is_private(path: Path) -> bool:
    """Whether a file or folder is not a link, belongs to this user or root, and nobody else can write to it."""
    found = path.lstat()
    is_owned = found.st_uid in (0, os.geteuid()) and not stat.S_ISLNK(found.st_mode)
    return is_owned and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def safe_name(text: str) -> str:
    """A file stem from any text, at most 96 bytes: letters and digits of all scripts stay, the rest become dashes.

    Two texts may give the same name, so callers that write many files prefix a number.
    """
    dashed = "".join(c if c.isalnum() else "-" for c in unicodedata.normalize("NFC", text))
    name = "-".join(filter(None, dashed.split("-")))
    return name.encode("utf-8", "ignore")[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip("-") or "unnamed"


@lru_cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter  # 0.1 s

    return TypeAdapter(shape)


def parse_json(data: bytes, origin: Path | str, *, allow_nan: bool = False) -> Any:
    """Parse JSON in UTF-8, refusing keys that occur twice, deep nesting, and numbers beyond 64 bits or not finite.

    Raises: ValueError that names `origin`.
    """
    check_counts(data.count(b","), data.count(b"[") + data.count(b"{"), origin)
    if (colons := data.count(b":")) > MAX_NAMES:
        raise ValueError(f"{origin} has {colons} colons; expected JSON with at most {MAX_NAMES} keys")
    try:
        value = json.loads(
            data.decode("utf-8-sig"),  # from bytes it would also accept UTF-16 and lone surrogates
            object_pairs_hook=_dict_of_unique_keys,
            parse_int=_integer,
            parse_float=None if allow_nan else _finite,
            parse_constant=None if allow_nan else _refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is damaged: not readable as JSON ({_first_line(error)})") from None
    if SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError(f"{origin} is damaged: it contains a lone surrogate, such as \\ud800") from None
    if isinstance(value, dict | list) and _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"{origin} is damaged: its JSON is nested more than {MAX_DEPTH} deep")
    return value


def check_counts(commas: int, brackets: int, origin: Path | str, max_values: int = MAX_VALUES) -> None:
    """Refuse JSON with so many values that they would take far more memory than its text.

    `commas`, `brackets`: the number of commas and of opening brackets ([ and {), including those inside strings.
    Raises: ValueError that names `origin`.
    """
    if commas > max_values or brackets > max_values // 4:
        raise ValueError(
            f"{origin} has {commas} commas and {brackets} brackets; expected JSON with at most {max_values} values, "
            f"{max_values // 4} of them lists or objects"
        )


def read_json(path: Path | str, shape: Any = Any, *, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = False) -> Any:
    """Read a JSON file whose value must match `shape`, a type.

    Raises: OSError if it cannot be opened; ValueError that names the file and the key.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes} bytes; expected a small JSON file")
    return checked(parse_json(data, path, allow_nan=allow_nan), shape, path)


def checked(value: Any, shape: Any, origin: Path | str) -> Any:
    """`value`, if it matches `shape`. Raises: ValueError that names `origin` and the key."""
    from pydantic import ValidationError

    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))[:200]
        got = "" if first["type"] == "missing" else f", got {reprlib.repr(first['input'])}"
        message = first["msg"].removeprefix("Input ").lower()
        raise ValueError(f"{origin} is damaged: {key or 'its value'}: {message}{got}") from None
    return value  # as it was read, including keys that `shape` does not have


def open_npy(
    path: Path | str, dtypes: DTypeLike | tuple[DTypeLike, ...], shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """Memory-map an array, read-only. `dtypes`: those allowed, including byte order; `shape`: None is any length.

    Raises: OSError if it cannot be opened; ValueError if its header does not match these, or its size the header.
    """
    allowed = [np.dtype(dtype) for dtype in (dtypes if isinstance(dtypes, tuple) else (dtypes,))]
    with open(path, "rb") as file:
        found, dtype = _read_npy_header(file, os.fstat(file.fileno()).st_size, path)
        begin = file.tell()
    fits = len(found) == len(shape) and all(want in (None, n) for n, want in zip(found, shape, strict=True))
    if not fits or dtype not in allowed:
        wanted = f"{' or '.join(map(str, allowed))} of shape {_describe_shape(shape)}"
        raise ValueError(f"{path} holds {str(dtype)[:80]} of shape {reprlib.repr(list(found))}; expected {wanted}")
    if not math.prod(found):
        return np.empty(found, dtype)  # nothing to map
    return np.memmap(path, dtype, "r", begin, found)


def read_npz(path: Path | str, *, max_bytes: int = MAX_NPZ_BYTES) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, numbers and text only.

    Raises: OSError if it cannot be opened; ValueError if it is damaged, or larger than `max_bytes` when unpacked.
    """
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > max_bytes:
                raise ValueError(f"it unpacks to more than {max_bytes} bytes")
            for member in archive.infolist():
                with archive.open(member) as packed:
                    data = io.BytesIO(packed.read(member.file_size))  # no more, even if more is packed
                shape, dtype = _read_npy_header(data, len(data.getbuffer()), member.filename)
                if dtype.kind not in "biufU":
                    raise ValueError(f"{member.filename} holds {str(dtype)[:80]}")
                array = np.frombuffer(data.getbuffer(), dtype, math.prod(shape), data.tell())
                arrays[member.filename.removesuffix(".npy")] = array.reshape(shape).copy()
    except OSError as error:
        if error.filename is not None or error.errno in DISK_ERRORS:
            raise
        raise ValueError(f"{path} is damaged: {_first_line(error)[:200]}") from None
    except Exception as error:  # zipfile and zlib raise a dozen exception types for damaged files
        raise ValueError(f"{path} is damaged: {_first_line(error)[:200]}") from None
    return arrays


def _read_npy_header(file: BinaryIO, size: int, name: Path | str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read an array's shape and type; its values follow in `file` and must end at `size`. Raises: ValueError."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from Python's parser
            shape, fortran_order, dtype = read(file, max_header_size=MAX_NPY_HEADER_BYTES)
    except Exception as error:  # numpy raises many exception types for a damaged header
        raise ValueError(f"{name} is not a readable .npy file ({_first_line(error)[:200]})") from None
    if not all(type(n) is int and 0 <= n <= LARGEST for n in shape) or fortran_order or dtype.hasobject:
        order = " in column-major order" if fortran_order else ""
        got = f"{str(dtype)[:80]} of shape {reprlib.repr(list(shape))}{order}"
        raise ValueError(f"{name} holds {got}; expected plain values in row-major order")
    expected = file.tell() + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ValueError(f"{name} has {size} bytes, its header says {expected}; it is cut short or damaged")
    return shape, dtype


def _describe_shape(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in shape)}]"


def _dict_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated[:200]!r} occurs twice")
    return result


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"the number {digits[:24]}... has {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:24]} is not finite")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether containers are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
