"""scripts/recipes/captions.py: lists that are not what they should be are one line."""

import csv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("recipes/captions")


@pytest.fixture(autouse=True)
def usual_limit() -> Iterator[None]:
    """Of a field; readers of captions raise it for the whole process."""
    before = csv.field_size_limit(131_072)
    yield
    csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"label,youtube_id,time_start,time_end\n" + 200_000 * b"a" + b",b,1,2\n",
            "not an annotations file of Kinetics",
        ),
        (b"youtube_id,time_start,time_end,label\nb,1,2\n", "not an annotations file of Kinetics"),
        (b"name,start\na,1\n", "not an annotations file of Kinetics"),
        (b"label\xff", "list.csv is not UTF-8 text"),
        (b"", "has none of the 0 videos that"),
        (b"label,youtube_id,time_start,time_end\nriding,b,1,2\n", "has none of the 1 videos that"),
    ],
)
def test_wrong_lists_of_kinetics(script: ModuleType, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        script.run("kinetics600", tmp_path, tmp_path / "list.csv")
    assert "\n" not in str(error.value) and not (tmp_path / "captions.csv").exists()
