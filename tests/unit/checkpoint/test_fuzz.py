"""Our own folders, damaged in every way that hypothesis thinks of: a clear line, or the very tensors; never a crash."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideo.checkpoint import load_checkpoint, save_checkpoint
from cogvideo.dtypes import DTYPE_OF_CODE
from cogvideo.tensor_file import MAX_HEADER_BYTES, read_header

from .test_format import seal

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half(), "c": torch.tensor([1, 2])}
quick = settings(max_examples=80, deadline=None)


@contextmanager
def restored(folder: Path) -> Iterator[Path]:
    """Yield the folder to be damaged; restore it afterwards."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        yield folder
    finally:
        for path, content in before.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


@pytest.fixture(scope="module", params=[1 << 20, 32], ids=["single", "sharded"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "c"
    save_checkpoint(folder, TENSORS, {"model": {"num_layers": 1}}, max_shard_bytes=request.param)
    return folder


def refused_or_same(folder: Path) -> str | None:
    """Load; the error's line, or None if all is as it was."""
    try:
        loaded = load_checkpoint(folder)
        tensors = loaded.tensors()
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error)
        assert str(folder) in str(error)
        return str(error)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    return None


def damage(data: st.DataObject, content: bytes) -> bytes:
    changed = bytearray(content)
    place = data.draw(st.integers(0, len(changed) - 1), label="place")
    match data.draw(st.sampled_from(["flip", "cut", "append", "remove", "insert"]), label="what"):
        case "flip":
            changed[place] ^= data.draw(st.integers(1, 255))
        case "cut":
            del changed[place:]
        case "append":
            changed += data.draw(st.binary(min_size=1, max_size=9))
        case "remove":
            del changed[place : place + data.draw(st.integers(1, 9))]
        case "insert":
            changed[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    return bytes(changed)


@quick
@given(data=st.data())
def test_damaged_files(checkpoint: Path, data: st.DataObject) -> None:
    with restored(checkpoint) as folder:
        path = folder / data.draw(st.sampled_from(sorted(p.name for p in checkpoint.iterdir())))
        before = path.read_bytes()
        path.write_bytes(damage(data, before))
        error = refused_or_same(folder)
        if path.name != "manifest.json" and path.read_bytes() != before:
            assert error is not None, "the hashes must find every change"


@quick
@given(data=st.data())
def test_damage_with_matching_hashes(checkpoint: Path, data: st.DataObject) -> None:
    """As if the manifest had been written by whoever damaged the file."""
    with restored(checkpoint) as folder:
        path = folder / data.draw(st.sampled_from(sorted(p.name for p in checkpoint.glob("model*"))))
        path.write_bytes(damage(data, path.read_bytes()))
        seal(folder)
        try:
            load_checkpoint(folder).tensors()
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
            assert str(folder) in str(error)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    for name in sorted(path.name for path in checkpoint.iterdir()):
        with restored(checkpoint) as folder:
            (folder / name).unlink()
            assert name in (refused_or_same(folder) or "")


def tensor_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "wrong"),
    [
        ({"x": entry(dtype="F99")}, bytes(8), "dtype 'F99'"),
        ({"x": entry(dtype="F16")}, bytes(8), "needs 4"),
        ({"x": entry(dtype=["F32"])}, bytes(8), "dtype"),
        ({"x": entry(shape=[3])}, bytes(8), "needs 12"),
        ({"x": entry(shape=[-2])}, bytes(8), "list of non-negative integers"),
        ({"x": entry(shape=[2.0])}, bytes(8), "list of non-negative integers"),
        ({"x": entry(shape=[True, 2])}, bytes(8), "list of non-negative integers"),
        ({"x": entry(shape=[2**62, 2**62, 2**62])}, bytes(8), "needs"),
        ({"x": entry(shape=[10**30])}, bytes(8), "has 31 digits"),
        ({"x": entry(shape=[-1])}, bytes(8), "list of non-negative integers"),
        ({"x": entry(offsets=[0, 2**40], shape=[2**38])}, bytes(8), "its header says"),
        ({"x": entry(offsets=[0, 8, 8])}, bytes(8), "too many"),
        ({"x": entry(offsets=[8, 16])}, bytes(16), "begins at byte 8"),
        ({"x": entry(), "y": entry()}, bytes(8), "begins at byte 0"),
        ({"x": entry()}, bytes(9), "cut short or padded"),
        ({"x": entry()}, bytes(7), "cut short or padded"),
        ({"x": [1]}, bytes(8), "does not give"),
        ([1], b"", "not a JSON object"),
        (b'{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "x": 1}', bytes(4), "'x' occurs twice"),
        (b"[" * 100_000, b"", "damaged"),
        (b'{"x\xff": 1}', b"", "damaged"),
        (b"", b"", "damaged"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, wrong: str) -> None:
    path = tensor_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=wrong) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 3])
def test_huge_headers_are_not_read(tmp_path: Path, length: int) -> None:
    path = tensor_file(tmp_path / "x.safetensors", {"x": entry()}, bytes(8), length=length)
    with pytest.raises(ValueError, match=r"cut short|damaged"):
        read_header(path)
    with open(path, "wb") as file:  # sparse
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(ValueError, match="expected at most"):
        read_header(path)


numbers = st.one_of(st.integers(-1, 40), st.integers(), st.floats(), st.booleans(), st.text(max_size=3), st.none())
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(sorted(DTYPE_OF_CODE)), st.text(max_size=4), numbers),
        "shape": st.one_of(st.lists(st.integers(0, 3), max_size=3), st.lists(numbers, max_size=9), numbers),
        "data_offsets": st.one_of(st.lists(st.integers(0, 24), min_size=2, max_size=2), st.lists(numbers), numbers),
    }
)


@quick
@given(header=st.dictionaries(st.text(max_size=3), st.one_of(entries, numbers), max_size=3), size=st.integers(0, 40))
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    path = tensor_file(tmp_path_factory.getbasetemp() / "any.safetensors", header, bytes(size))
    try:
        infos = read_header(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert sum(info.nbytes for info in infos.values()) == size


@pytest.mark.parametrize("value", [[], None, 5, {"files": 5}, {"files": {"config.json": {"size": "1", "sha256": 1}}}])
def test_hostile_manifests(checkpoint: Path, value: Any) -> None:
    with restored(checkpoint) as folder:
        (folder / "manifest.json").write_text(json.dumps(value))
        assert "damaged" in (refused_or_same(folder) or "")


@pytest.mark.parametrize("value", [[], {}, {"format": 1}, {"format": 1, "config": [], "extra": {}}, {"format": "x"}])
def test_hostile_configs(checkpoint: Path, value: Any) -> None:
    with restored(checkpoint) as folder:
        (folder / "config.json").write_text(json.dumps(value))
        seal(folder)
        assert "config.json" in (refused_or_same(folder) or "")
