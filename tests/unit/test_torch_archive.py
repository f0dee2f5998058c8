"""The .pt files: ours are torch's, torch's are read, and nothing in one is ever run."""

import argparse
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogvideo.tensor_file import TensorInfo
from cogvideo.torch_archive import MAX_PICKLE_BYTES, check_archive, read_module, write_module


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "a.weight": torch.randn(5, 3, generator=generator).half(),
        "b": torch.randn(7, generator=generator),
        "c": torch.tensor(2.5).bfloat16(),
        "d": torch.zeros(0, 2),
    }


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    write_module(path, infos, tensors.__getitem__, {"iteration": 7})
    return path


def test_the_line_about_a_file_of_old_torch_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"module": {"a": torch.ones(3)}}
    torch.save(state, tmp_path / "ice_image.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"ice_image\.pt is in the torch\.save format from before PyTorch 1\.6"
    ) as caught:
        read_module(tmp_path / "ice_image.pt")
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).partition("in its folder: ")[2], {"torch": torch})
    assert read_module(tmp_path / "ice_image.pt")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_we_write(tmp_path: Path, mmap: bool) -> None:
    state = torch.load(write(tmp_path / "x.pt", some_tensors()), weights_only=True, mmap=mmap)
    assert state["iteration"] == 7
    assert list(state["module"]) == list(some_tensors())
    for name, tensor in some_tensors().items():
        assert state["module"][name].dtype == tensor.dtype
        assert torch.equal(state["module"][name], tensor)


def test_every_record_is_aligned_and_has_its_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", some_tensors())
    check_archive(path, checksums=True)
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            header = path.read_bytes()[record.header_offset : record.header_offset + 30]
            extra = int.from_bytes(header[28:30], "little")
            assert (record.header_offset + 30 + len(record.filename) + extra) % 64 == 0


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    torch.save({"module": some_tensors(), "rng": np.random.get_state(), "lr": [None, 0.5]}, tmp_path / "x.pt")
    read = read_module(tmp_path / "x.pt")
    assert all(torch.equal(read[name], tensor) for name, tensor in some_tensors().items())


def test_objects_that_deepspeed_stores_with_the_module_are_read(tmp_path: Path) -> None:
    """As its engine writes it under ZeRO: shapes of the flattened parameters, names of sparse modules, its settings."""
    shapes = {name: tensor.shape for name, tensor in some_tensors().items()}
    others = {
        "buffer_names": [],
        "param_shapes": [OrderedDict(shapes)],
        "csr_tensor_module_names": set(),
        "sparse_tensor_module_names": {"word_embeddings"},
        "ds_config": {"fp16": {"enabled": True}, "dtype": torch.float16},
        "device": torch.device("cpu"),
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "lr_scheduler": None,
    }
    torch.save({"module": OrderedDict(some_tensors()), **others}, tmp_path / "x.pt")
    assert list(read_module(tmp_path / "x.pt")) == list(some_tensors())


def test_views_into_one_flat_buffer_are_read(tmp_path: Path) -> None:
    """ZeRO's 16-bit parameters are pieces of one buffer, which the file holds once."""
    flat = torch.arange(24.0).half()
    torch.save({"module": {"a": flat[:12].view(3, 4), "b": flat[12:]}}, tmp_path / "x.pt")
    read = read_module(tmp_path / "x.pt")
    assert torch.equal(read["a"], flat[:12].view(3, 4)) and torch.equal(read["b"], flat[12:])
    check_archive(tmp_path / "x.pt", checksums=True)


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["module", "tensor", "sibling"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, place: str) -> None:
    planted = RunsCode(tmp_path / "it ran")
    state: dict[str, Any] = {"module": some_tensors()}
    if place == "module":
        state["module"] = planted
    elif place == "tensor":
        state["module"]["a.weight"] = planted
    else:
        state["args"] = planted
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"holds posix\.mkdir"):
        read_module(tmp_path / "x.pt")
    assert not (tmp_path / "it ran").exists()
    pickle.loads(pickle.dumps(planted))  # the plant itself works
    assert (tmp_path / "it ran").exists()


def test_code_in_a_pickle_outside_an_archive_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "it ran")))
    torch.save({"module": RunsCode(tmp_path / "it ran")}, tmp_path / "y.pt", _use_new_zipfile_serialization=False)
    for name in ("x.pt", "y.pt"):
        with pytest.raises(ValueError, match=r"in the torch\.save format"):
            read_module(tmp_path / name)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"module": {}, "args": argparse.Namespace(a=1)}, r"argparse\.Namespace"),
        ({"module": {"x": bytearray(9)}}, "bytearray"),
        ({"weights": {}}, "under 'module'"),
        ([1, 2], "under 'module'"),
        ({"module": {"x": 5}}, "is a int"),
        ({"module": {3: torch.zeros(1)}}, "a key that is a int"),
        ({"module": {((),): torch.zeros(1)}}, "a key that is a tuple"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, state: Any, named: str) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=named):
        read_module(tmp_path / "x.pt")


def bare_pickle(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"x/{name}", content)
    return path


MODULE, TUPLE1, TUPLE2 = b"\x80\x02}X\x06\x00\x00\x00module}", b"\x85", b"\x86"


@pytest.mark.parametrize(
    "key",
    [
        b")" + TUPLE1 * 1_000_000,  # deep: hashing it would overrun the stack of C
        b")" + (b"K\x01" + TUPLE2) * 1_000_000,
        b")" + b"".join(b"q%cq\xffh%c" % (i, i) + TUPLE2 for i in range(60)),  # shared: 2^60 visits to hash it
    ],
    ids=["deep", "deep by pairs", "shared"],
)
def test_keys_too_deep_to_hash_are_refused(tmp_path: Path, key: bytes) -> None:
    path = bare_pickle(tmp_path / "x.pt", MODULE + key + b"K\x01ss.")
    with pytest.raises(ValueError, match="nests tuples too deep"):
        read_module(path)


def test_a_pickle_of_many_small_objects_is_refused_unread(tmp_path: Path) -> None:
    path = bare_pickle(tmp_path / "x.pt", b"\x80\x02(" + b"]" * (MAX_PICKLE_BYTES + 1) + b"l.")
    with pytest.raises(ValueError, match=r"a pickle of \d+ bytes"):
        read_module(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A bomb: a gigabyte of zeros in a megabyte."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 20))
    with pytest.raises(ValueError, match=r"claims more data|compressed"):
        read_module(tmp_path / "x.pt")


def test_a_flipped_byte_of_data_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", some_tensors())
    data = bytearray(path.read_bytes())
    values = some_tensors()["b"].numpy().tobytes()
    data[data.index(values) + 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"Bad CRC-32|checksum"):
        check_archive(path, checksums=True)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_an_error_of_one_line(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "undamaged.pt").exists():
        write(tmp_path / "undamaged.pt", some_tensors())
    content = bytearray((tmp_path / "undamaged.pt").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(["set", "cut", "remove", "insert"]))
        some = data.draw(st.binary(min_size=1, max_size=8))
        if what == "set":
            content[place : place + len(some)] = some
        elif what == "insert":
            content[place:place] = some
        elif what == "remove":
            del content[place : place + len(some)]
        else:
            del content[place + 1 :]
        content = content or bytearray(b"PK")
    (tmp_path / "x.pt").write_bytes(content)
    try:
        read = read_module(tmp_path / "x.pt")
    except ValueError as error:
        assert str(tmp_path / "x.pt") in str(error)
        assert "\n" not in str(error)
    else:
        assert sum(tensor.nbytes for tensor in read.values()) <= len(content)
