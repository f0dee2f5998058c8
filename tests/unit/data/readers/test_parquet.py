"""Parquet: row groups, types, columns of bytes, damage, and what a hostile file may take."""

import datetime
import decimal
import json
import os
import signal
import sys

import pytest

from cogvideo.data import parquet_file
from cogvideo.data.captions import Caption
from cogvideo.data.readers import open_captions
from cogvideo.data.readers import parquet as module

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
parquet = pytest.importorskip("pyarrow.parquet")


def captions_of(tmp_path, columns, row_group_size=2, **options):
    parquet.write_table(pyarrow.table(columns), tmp_path / "c.parquet", row_group_size=row_group_size)
    return open_captions(tmp_path / "c.parquet", **options)


@pytest.fixture
def limits(monkeypatch):
    """Sets limits; they are those of this process, in which files are parsed then."""

    def set_limits(**values):
        for name, value in values.items():
            monkeypatch.setattr(parquet_file, name, value)
        monkeypatch.setattr(parquet_file, "_opened", None)
        monkeypatch.setattr(module, "run", lambda path, operation, arguments, **_: operation(**arguments))

    return set_limits


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
        ({"video": ["a.mp4"], "caption": [float("nan")]}, "row 1: caption=nan; expected text"),
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


def test_the_size_of_a_row_group_is_that_of_the_columns_that_are_read(tmp_path, limits):
    columns = {
        "video": [f"{i}.mp4" for i in range(100)],
        "caption": [f"caption {i}" for i in range(100)],
        "meta.size": list(range(100)),
        "thumbnail": [bytes([i]) * 1000 for i in range(100)],
    }
    limits(MAX_GROUP_BYTES=20_000)
    captions = captions_of(tmp_path, columns, row_group_size=100)
    assert captions.select([7])[0].text == "caption 7", "the bytes that are left out do not count"
    limits(MAX_GROUP_BYTES=1_000)
    with pytest.raises(ValueError, match="a row group of 0 MiB; write it in row groups of at most 0 MiB"):
        open_captions(tmp_path / "c.parquet")


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
def test_a_text_that_is_repeated_is_held_once(tmp_path, limits, piece_bytes):
    limits(PIECE_BYTES=piece_bytes, ANSWER_BYTES=100_000)
    write_repeated(tmp_path / "c.parquet", 500, "x" * 60_000)
    before = pyarrow.total_allocated_bytes()
    captions = open_captions(tmp_path / "c.parquet")
    assert len(captions) == 500 and len(captions.select([499, 0])[1].text) == 60_000
    assert pyarrow.total_allocated_bytes() - before < 1 << 20


@pytest.mark.parametrize("piece_bytes", [1 << 27, 300])
def test_large_rows_are_refused_and_others_are_read(tmp_path, limits, piece_bytes):
    limits(ANSWER_BYTES=1000, PIECE_BYTES=piece_bytes)
    columns = {
        "video": [f"{i}.mp4" for i in range(7)],
        "caption": [["x"], ["y" * 400] * 3, ["z"], None, ["z", "u"], ["v"], ["w"]],
        "more": [{"a": "x"}, None, {"a": "x"}, None, {"a": None}, {"a": "\x01" * 300}, {"a": "x"}],
        "tags": pyarrow.array([[], [("x", "x")], [("x", "y" * 2000)], None, [("x", "x")], [], []], TAGS),
        "numbers": [[0], [], [], [], [], [], [0] * 2000],
    }
    captions = captions_of(tmp_path, columns, row_group_size=7, skip_bad=True)
    assert [caption.text for caption in captions] == ["x", "z", "u"]
    large = "it takes more than 4194304 bytes"  # the message is the other process's
    assert [record.reason == large for record in captions.bad] == [True, True, False, True, True]
    assert captions.bad[2].reason == "caption=None; expected text"


def test_sizes_of_rows_are_those_of_their_texts(tmp_path):
    columns = {
        "text": pyarrow.array(["x" * 5, None, "xyz"]),
        "same": pyarrow.array(["x" * 9, "y", None]).dictionary_encode(),
        "view": pyarrow.array(["x" * 50, None, ""], "string_view"),
        "list": pyarrow.array([["x", "yy"], None, []], pyarrow.list_(pyarrow.string())),
        "pair": pyarrow.array([["x", "yy"], ["", None], ["zzz", "z"]], pyarrow.list_(pyarrow.string(), 2)),
        "fields": pyarrow.array([{"a": "x" * 7, "b": [1, 2]}, None, {"a": None, "b": []}]),
        "tags": pyarrow.array([[("k", "v")], None, [("kk", None)]], TAGS),
    }
    expected = {
        "text": [5, 0, 3],
        "same": [9, 1, 0],
        "view": [50, 0, 0],
        "list": [3, 0, 0],
        "pair": [3, 0, 4],
        "fields": [11, 0, 0],
        "tags": [2, 0, 2],
    }
    table = pyarrow.table(columns)
    for name, sizes in expected.items():
        one = table.select([name])
        found = parquet_file._row_bytes(one).tolist()
        # a missing value may count as an entry of the dictionary does
        assert [size for size, value in zip(found, one[name].to_pylist(), strict=True) if value is not None] == [
            size for size, value in zip(sizes, one[name].to_pylist(), strict=True) if value is not None
        ], name
        assert parquet_file._row_bytes(one.slice(2)).tolist() == found[2:], name


@pytest.mark.parametrize("answer_bytes", [1 << 20, 400])
def test_a_large_row_group_is_read_in_parts(tmp_path, limits, answer_bytes):
    limits(PIECE_BYTES=3000, ANSWER_BYTES=answer_bytes)
    columns = {"video": [f"{i}.mp4" for i in range(100)], "caption": [f"caption {i}" for i in range(100)]}
    captions = captions_of(tmp_path, columns, row_group_size=60)
    order = [99, 0, 59, 60, 7, 7, 8, 61]
    assert [caption.text for caption in captions.select(order)] == [f"caption {i}" for i in order]
    assert [caption.video for caption in captions] == columns["video"]


def test_claims_of_many_rows_or_values_are_refused(tmp_path, limits):
    write_repeated(tmp_path / "c.parquet", 100_000, "x")
    limits(MAX_ROWS=1000)
    with pytest.raises(ValueError, match=r"c\.parquet claims 100000 rows in \d+ bytes"):
        open_captions(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="a row group with 2000 values in a column; write it in row groups of at most"):
        limits(MAX_VALUES=1000)
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


def test_a_file_that_ends_pyarrow_is_one_line(tmp_path, fresh_sandbox):
    captions = captions_of(tmp_path, {"video": ["a.mp4"], "caption": ["x"]})
    os.kill(fresh_sandbox[0].process.pid, signal.SIGABRT)
    fresh_sandbox[0].process.wait()
    with pytest.raises(ValueError, match=r"c\.parquet cannot be read: PyArrow ended with SIGABRT; write it again"):
        captions.select([0])
    assert captions.select([0])[0].text == "x", "the next process reads on"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("size", "problem"), [(60_000, "unpack to more than 16 MiB"), (9_000_000, "it takes more than")]
)
def test_a_long_text_in_many_rows_is_refused_and_takes_little(tmp_path, fresh_sandbox, monkeypatch, size, problem):
    """The rows unpack to gigabytes, from a file of kilobytes."""
    monkeypatch.setattr(module, "MAX_BYTES", 16 << 20)
    write_repeated(tmp_path / "c.parquet", 20_000, "x" * size, row_group_size=20_000)
    with pytest.raises(ValueError, match=rf"c\.parquet.*{problem}"):
        open_captions(tmp_path / "c.parquet", skip_bad=True)
    for worker in fresh_sandbox:
        with open(f"/proc/{worker.process.pid}/status", encoding="ascii") as status:
            assert next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) < 300 << 10


def test_a_file_that_changes_is_one_line(tmp_path):
    captions = captions_of(tmp_path, {"video": ["a.mp4"] * 5, "caption": ["x"] * 5})
    parquet.write_table(pyarrow.table({"video": ["a.mp4"], "caption": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet: the file has changed; start again"):
        captions.select([4])


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"count": 1}, b"{"),
        ({"count": 1}, b"[" * 9000),
        ({"count": 1}, b"3"),
        ({"count": 0}, b'[["video", "caption"], [[], []]]'),
        ({"count": 1}, b"[[], []]" + b" " * (2 * parquet_file.ANSWER_BYTES)),
        ({"count": 1}, b'[["video"], []]'),
        ({"count": 2}, b'[["video", "caption"], [["a.mp4"], ["x"]]]'),
        ({"count": "1"}, b'[["video", "caption"], [["a.mp4"], ["x"]]]'),
        ({}, b'[["video", "caption"], [["a.mp4"], ["x"]]]'),
        (None, b""),
    ],
)
def test_an_answer_of_another_form_is_one_line(tmp_path, monkeypatch, fields, data):
    """As from a process that a file has taken over."""
    captions = captions_of(tmp_path, {"video": ["a.mp4"] * 5, "caption": ["x"] * 5})
    answers = [] if fields is None else [(fields, (parquet_file.np.frombuffer(data, "u1"),))]
    monkeypatch.setattr(module, "run", lambda *_, **__: iter(answers))
    with pytest.raises(
        ValueError, match=r"c\.parquet cannot be read: the process that parses it gave a damaged answer"
    ):
        captions.select([0, 1])


@pytest.mark.parametrize(
    ("rows", "columns"), [("x", b"[]"), (1, b"["), (1, b"[" * 9000), (1, b"3"), (1, b'[["video"]]'), (1, None)]
)
def test_a_description_of_another_form_is_one_line(tmp_path, monkeypatch, rows, columns):
    (tmp_path / "c.parquet").touch()
    arrays = () if columns is None else (parquet_file.np.frombuffer(columns, "u1"),)
    monkeypatch.setattr(module, "run", lambda *_, **__: iter([({"rows": rows, "stamp": []}, arrays)]))
    with pytest.raises(
        ValueError, match=r"c\.parquet cannot be read: the process that parses it gave a damaged answer"
    ):
        open_captions(tmp_path / "c.parquet")


def test_names_of_columns_that_are_too_long_are_one_line(tmp_path, limits):
    limits(ANSWER_BYTES=100)
    with pytest.raises(ValueError, match=r"c\.parquet: its column names take \d+ bytes; expected at most 100"):
        captions_of(tmp_path, {"video": ["a.mp4"], "caption": ["x"], "y" * 99: [1]})


def test_dates_are_no_text_and_no_seconds(tmp_path):
    day = datetime.date(2024, 1, 2)
    with pytest.raises(ValueError, match=r"row 1: caption=\{'date': '2024-01-02'\}; expected text"):
        captions_of(tmp_path, {"video": ["a.mp4"], "caption": [day]})
    with pytest.raises(ValueError, match=r"row 1: caption=\[\{'Decimal': '1.5'\}\]; expected text"):
        captions_of(tmp_path, {"video": ["a.mp4"], "caption": [[decimal.Decimal("1.5")]]})
    with pytest.raises(ValueError, match="row 1: start='2024-01-02'; expected seconds"):
        captions_of(tmp_path, {"video": ["a.mp4"], "caption": ["x"], "start": [day]})
    assert json.dumps(captions_of(tmp_path, {"video": ["a.mp4"], "caption": ["x"], "b": [[day]]}).select([0])[0].extra)
