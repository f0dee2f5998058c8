"""One safetensors file: read whole, after its header was checked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogvideo.tensor_file import MAX_HEADER_BYTES, read_tensors


def test_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(0, 2).half()}
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TWICE = f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'


@pytest.mark.parametrize(
    ("header", "length", "problem"),
    [
        (TWICE, None, "occurs twice"),
        (json.dumps({"a": ENTRY | {"shape": [1 << 40]}}), None, "spans 4 bytes"),
        (json.dumps({"a": ENTRY}) + " " * MAX_HEADER_BYTES, None, "a header of"),
        ("{}", 1 << 60, "is cut short"),
        ('{"__metadata__": ' + "[" * 100_000, None, "not readable as JSON"),
    ],
    ids=["twice", "claims", "large", "long", "deep"],
)
def test_a_hostile_header_is_refused_before_its_data(
    tmp_path: Path, header: str, length: int | None, problem: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((length or len(header)).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(ValueError, match=rf"x\.safetensors .*{problem}"):
        read_tensors(path)
