"""Parquet: row groups, types, columns of bytes, damage."""

import datetime
import decimal
import sys

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers import open_captions

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
parquet = pytest.importorskip("pyarrow.parquet")


def captions_of(tmp_path, columns, row_group_size=2, **options):
    parquet.write_table(pyarrow.table(columns), tmp_path / "c.parquet", row_group_size=row_group_size)
    return open_captions(tmp_path / "c.parquet", **options)


def test_rows_are_found_again_in_any_row_group(tmp_path):
    columns = {"file_name": [f"{i}.mp4" for i in range(7)], "text": [[f"{i}", "y"] for i in range(7)]}
    captions = captions_of(tmp_path, columns)
    assert len(captions) == 14 and [caption.text for caption in captions][:4] == ["0", "y", "1", "y"]
    assert [caption.video for caption in captions.select([13, 0, 6])] == ["6.mp4", "0.mp4", "3.mp4"]


def test_missing_values_and_other_columns(tmp_path):
    nan = float("nan")
    columns = {
        "video": ["a.mp4", "b.mp4", "c.mp4"],
        "caption": ["x", None, "z"],
        "start": [nan, 0.0, 1.5],
        "fps": [nan, 1.0, 2.0],
        "day": [datetime.date(2024, 1, 2)] * 3,
        "thumbnail": [b"\xff"] * 3,
    }
    captions = captions_of(tmp_path, columns, skip_bad=True)
    day = {"day": "2024-01-02"}
    assert list(captions) == [
        Caption("a.mp4", "x", extra={"fps": None, **day}),
        Caption("c.mp4", "z", 1.5, extra={"fps": 2.0, **day}),
    ]
    assert captions.bad_reasons() == ["c.parquet row 2: caption=None; expected text"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"video": ["a.mp4"], "caption": [3]}, "row 1: caption=3; expected text"),
        ({"video": ["a.mp4"], "caption": [float("nan")]}, "row 1: caption=None"),
        ({"video": ["a.mp4"], "label": ["x"]}, "name one with --caption-column"),
        ({"video": ["a.mp4"], "text": ["x"], "title": ["x"]}, "choose with --caption-column"),
        ({"video": [{"bytes": b"x", "path": "a.mp4"}], "caption": ["x"]}, "column 'video' holds bytes"),
        ({"video": pyarrow.array([], "string"), "caption": pyarrow.array([], "string")}, "holds no captions"),
    ],
)
def test_refused_in_one_line(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        captions_of(tmp_path, columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 100, -20])
def test_a_damaged_file(tmp_path, keep):
    captions_of(tmp_path, {"video": ["a.mp4"] * 50, "caption": ["x"] * 50})
    data = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="is not a readable Parquet file") as caught:
        open_captions(tmp_path / "c.parquet")
    assert "\n" not in str(caught.value)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[parquet\]'"):
        open_captions(tmp_path / "c.parquet")


def test_types_of_seconds(tmp_path):
    columns = {
        "video": pyarrow.array(["a.mp4", "b.mp4"]).dictionary_encode(),
        "caption": ["x", "y"],
        "start": pyarrow.array([datetime.timedelta(seconds=0.5), None]),
        "end": pyarrow.array([decimal.Decimal("1.50"), None]),
    }
    assert list(captions_of(tmp_path, columns)) == [Caption("a.mp4", "x", 0.5, 1.5), Caption("b.mp4", "y")]


def test_the_size_of_a_row_group_is_that_of_the_columns_that_are_read(tmp_path, monkeypatch):
    columns = {
        "video": [f"{i}.mp4" for i in range(100)],
        "caption": [f"caption {i}" for i in range(100)],
        "meta.size": list(range(100)),
        "thumbnail": [bytes([i]) * 1000 for i in range(100)],
    }
    captions = captions_of(tmp_path, columns, row_group_size=100)
    monkeypatch.setattr("cogvideo.data.readers.parquet.MAX_GROUP_BYTES", 20_000)
    assert captions.select([7])[0].text == "caption 7", "the bytes that are left out do not count"
    monkeypatch.setattr("cogvideo.data.readers.parquet.MAX_GROUP_BYTES", 1_000)
    with pytest.raises(ValueError, match="a row group of 0 MiB; write it in row groups of at most 0 MiB"):
        open_captions(tmp_path / "c.parquet").select([7])


def test_text_that_is_not_utf_8_is_named_with_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"video": ["a.mp4"], "caption": ["a red digit"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"a red digit", b"a red \xff\xffgit"))
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable Parquet file"):
        open_captions(path, skip_bad=True)


TAGS = pyarrow.map_(pyarrow.string(), pyarrow.string())


def write_repeated(path, rows, text, **options):
    """A small file of a text that is repeated in every row."""
    columns = {
        name: pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, "int32"), pyarrow.array([value]))
        for name, value in (("video", "a.mp4"), ("caption", text))
    }
    parquet.write_table(pyarrow.table(columns), path, compression="zstd", **options)


@pytest.mark.parametrize("piece_bytes", [1 << 27, 100])
def test_a_text_that_is_repeated_is_held_once(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr("cogvideo.data.readers.parquet.PIECE_BYTES", piece_bytes)
    monkeypatch.setattr("cogvideo.data.readers.parquet.MAX_TEXT_BYTES", 100_000)
    write_repeated(tmp_path / "c.parquet", 500, "x" * 60_000)
    before = pyarrow.total_allocated_bytes()
    captions = open_captions(tmp_path / "c.parquet")
    assert len(captions) == 500 and len(captions.select([499, 0])[1].text) == 60_000
    assert pyarrow.total_allocated_bytes() - before < 1 << 20


def test_a_row_of_long_texts_is_refused_and_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideo.data.readers.parquet.MAX_TEXT_BYTES", 1000)
    columns = {
        "video": [f"{i}.mp4" for i in range(5)],
        "caption": [["x"], ["y" * 400] * 3, ["z"], None, ["z", "u"]],
        "more": [{"a": "x"}, None, {"a": "x"}, None, {"a": None}],
        "tags": pyarrow.array([[], [("x", "x")], [("x", "y" * 2000)], None, [("x", "x")]], TAGS),
    }
    captions = captions_of(tmp_path, columns, row_group_size=5, skip_bad=True)
    assert [caption.text for caption in captions] == ["x", "z", "u"]
    long = "its texts take more than 1000 bytes"
    assert [record.reason for record in captions.bad][:2] == [long, long] and len(captions.bad) == 3


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideo.data.readers.parquet.PIECE_BYTES", 300)
    columns = {"video": [f"{i}.mp4" for i in range(100)], "caption": [f"caption {i}" for i in range(100)]}
    captions = captions_of(tmp_path, columns, row_group_size=60)
    order = [99, 0, 59, 60, 7, 7, 8, 61]
    assert [caption.text for caption in captions.select(order)] == [f"caption {i}" for i in order]
    assert [caption.video for caption in captions] == columns["video"]


def test_claims_of_many_rows_or_values_are_refused(tmp_path, monkeypatch):
    write_repeated(tmp_path / "c.parquet", 100_000, "x")
    monkeypatch.setattr("cogvideo.data.readers.parquet.MAX_ROWS", 1000)
    with pytest.raises(ValueError, match=r"c\.parquet claims 100000 rows in \d+ bytes"):
        open_captions(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="a row group with 2000 values in a column; write it in row groups of at most"):
        monkeypatch.setattr("cogvideo.data.readers.parquet.MAX_VALUES", 1000)
        captions_of(tmp_path, {"video": ["a.mp4"], "caption": [["x"] * 2000]})


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "list", "large_list"])
def test_texts_of_every_type(tmp_path, kind):
    types = {
        "list": pyarrow.list_(pyarrow.string()),
        "large_list": pyarrow.large_list(pyarrow.large_string()),
        "dictionary": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    }
    values = [["x"], ["y"]] if "list" in kind else ["x", "y"]
    caption = (
        pyarrow.array(values).dictionary_encode()
        if kind == "dictionary"
        else pyarrow.array(values, types.get(kind, kind))
    )
    tags = pyarrow.array([[("k", "v")], []], TAGS)
    captions = captions_of(tmp_path, {"video": ["a.mp4", "b.mp4"], "caption": caption, "tags": tags})
    assert [caption.text for caption in captions] == ["x", "y"] and captions.select([0])[0].extra == {
        "tags": [["k", "v"]]
    }
