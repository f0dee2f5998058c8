"""Which field is what, values of all types, several captions, further fields."""

from datetime import time, timedelta
from decimal import Decimal

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers.records import MAX_CAPTIONS, ReadOptions, RecordReader, Row


class Given:
    """Rows held in memory."""

    def __init__(self, *fields, is_text=False):
        self.fields, self.is_text = fields, is_text

    def scan(self):
        return self.read(range(len(self.fields)))

    def read(self, positions):
        return (Row(position, f"row {position}", self.fields[position]) for position in positions)


def read(tmp_path, *fields, is_text=False, **names):
    reader = RecordReader(tmp_path / "c", tmp_path, Given(*fields, is_text=is_text), ReadOptions(**names))
    return [caption for _, caption in reader.scan()]


@pytest.mark.parametrize("video", ["video", "file_name", "path", "clip", "File Name", "VIDEO-PATH"])
@pytest.mark.parametrize("caption", ["caption", "captions", "text", "prompt", "title", "Text"])
def test_usual_names(tmp_path, video, caption):
    assert read(tmp_path, {video: "a.mp4", caption: "x", "start_time": 1}) == [Caption("a.mp4", "x", 1.0)]


def test_two_candidates_are_one_line_that_names_the_option(tmp_path):
    record = {"video": "a.mp4", "text": "x", "title": "y"}
    with pytest.raises(
        ValueError, match=r"row 0: 'text' and 'title' could each be the caption; choose with --caption-column"
    ):
        read(tmp_path, record)
    assert read(tmp_path, record, caption="title") == [Caption("a.mp4", "y", extra={"text": "x"})]


def test_names_that_are_given(tmp_path):
    record = {"vid": "a.mp4", "label": "x", "from": 1, "to": 2.5, "text": "other"}
    names = {"video": "vid", "caption": "label", "start": "from", "end": "to"}
    assert read(tmp_path, record, **names) == [Caption("a.mp4", "x", 1.0, 2.5, {"text": "other"})]
    (bad,) = read(tmp_path, {"video": "a.mp4", "text": "x"}, caption="label")
    assert bad.reason == "there is no field 'label'; the fields are: video, text"


def test_a_name_given_for_one_role_is_no_candidate_for_another(tmp_path):
    record = {"path": "a.mp4", "video": "x"}
    assert read(tmp_path, record, caption="video") == [Caption("a.mp4", "x")]


def test_several_captions_and_their_positions(tmp_path):
    rows = Given({"video": "a.mp4", "caption": ["x", " ", "y"]}, {"video": "b.mp4", "caption": "z"})
    reader = RecordReader(tmp_path / "c", tmp_path, rows, ReadOptions())
    found = list(reader.scan())
    assert found[0][1] == Caption("a.mp4", "x") and found[1][1] == (
        "row 0, caption 2",
        "the caption is empty; describe the video in a few words",
    )
    order = [3, 0, 2]
    assert list(reader.read(found[i][0] for i in order)) == [found[i][1] for i in order]


def test_other_fields_are_kept_as_json_holds_them(tmp_path):
    extra = {"fps": float("nan"), "size": (1, 2), "tags": {"a": None}, "half": "\ud800", "id": b"\0", "\ud801": 1}
    (caption,) = read(tmp_path, {"video": "a.mp4", "caption": "x", **extra})
    assert caption.extra == {"fps": None, "size": [1, 2], "tags": {"a": None}, "half": "?", "id": "b'\\x00'", "?": 1}
    assert '"extra": {"fps": null' in caption.to_json_line()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"video": "a.mp4"}, "no caption field; the fields are: video; name one with --caption-column"),
        ({"caption": "x"}, "no video field"),
        ({"video": "a.mp4", "caption": 3}, "caption=3; expected text"),
        ({"video": "a.mp4", "caption": None}, "caption=None; expected text"),
        ({"video": "a.mp4", "caption": []}, "the list of captions is empty"),
        ({"video": "a.mp4", "caption": ["x", 1]}, "expected text"),
        ({"video": "a.mp4", "caption": ["x"] * (MAX_CAPTIONS + 1)}, "expected at most 1024"),
        ({"video": "a.mp4", "caption": "a\0b"}, "control character (U+0000)"),
        ({"video": "a.mp4", "caption": "x" * 70_000}, "has 70000 characters or more; give at most 65536"),
        ({"video": "a.mp4", "caption": "x", "more": "x" * (1 << 21)}, "the other fields take more than"),
        ({"video": 3, "caption": "x"}, "video=3"),
        ({"video": None, "caption": "x"}, "video=None"),
        ({"video": "a.mp4", "caption": "x", "start": "soon"}, "start='soon'; expected seconds"),
        ({"video": "a.mp4", "caption": "x", "start": [1]}, "start=[1]; expected seconds"),
    ],
)
def test_a_record_that_cannot_be_used(tmp_path, fields, reason):
    (bad,) = read(tmp_path, fields)
    assert bad.place == "row 0" and reason in bad.reason and len(bad.reason) < 200


def test_a_reason_is_one_line(tmp_path):
    (bad,) = read(tmp_path, {"a\nb\ud800": "x"})
    assert "the fields are: a b?;" in bad.reason


def test_fields_nested_too_deeply(tmp_path):
    deep = []
    for _ in range(5000):
        deep = [deep]
    (bad,) = read(tmp_path, {"video": "a.mp4", "caption": "x", "more": deep})
    assert "nested too deeply" in bad.reason


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("2.5", "", (2.5, None)),
        ("", "1:02:03.5", (0.0, 3723.5)),
        ("0:05", "00:00:07", (5.0, 7.0)),
        ("1,5", "NaN", (1.5, None)),
        ("\\N", "2", (0.0, 2.0)),
        ("soon", "", "start='soon'; expected seconds, or h:mm:ss"),
        ("nan", "-1", "expected 0 <= start < end"),
    ],
)
@pytest.mark.parametrize("is_text", [True, False])
def test_seconds_as_text(tmp_path, start, end, expected, is_text):
    (found,) = read(tmp_path, {"video": "a.mp4", "caption": "x", "start": start, "end": end}, is_text=is_text)
    assert (expected in found.reason) if isinstance(expected, str) else (found.start, found.end) == expected


def test_seconds_in_the_types_of_parquet(tmp_path):
    spans = [
        (Decimal("0.50"), None, (0.5, None)),
        (timedelta(milliseconds=1500), timedelta(minutes=1), (1.5, 60.0)),
        (time(0, 0, 2, 250_000), time(1, 0, 3), (2.25, 3603.0)),
    ]
    for start, end, expected in spans:
        (found,) = read(tmp_path, {"video": "a.mp4", "caption": "x", "start": start, "end": end})
        assert (found.start, found.end) == expected


def test_a_byte_order_mark_in_a_name(tmp_path):
    assert read(tmp_path, {"\ufeffvideo": "a.mp4", "caption": "x"}) == [Caption("a.mp4", "x")]


@pytest.mark.parametrize("text", ["NA", "null", "None", "\\N"])
def test_a_missing_caption_is_text_where_the_format_has_types(tmp_path, text):
    (found,) = read(tmp_path, {"video": "a.mp4", "caption": text}, is_text=True)
    assert f"the caption is missing ({text!r})" in found.reason
    assert read(tmp_path, {"video": "a.mp4", "caption": text}) == [Caption("a.mp4", text)]


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("42", ["42"]),
        ('["x", "y"]', ["x", "y"]),
        ("['it''s', \"y\"]", ["its", "y"]),
        ("[music]", ["[music]"]),
        ("[1, 2]", ["[1, 2]"]),
    ],
)
def test_captions_in_tables_of_text(tmp_path, cell, texts):
    found = read(tmp_path, {"video": "a.mp4", "caption": cell}, is_text=True)
    assert [caption.text for caption in found] == texts


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", "NULL", "<NA>", "#N/A", " "])
def test_missing_captions_in_tables_of_text(tmp_path, cell):
    (bad,) = read(tmp_path, {"video": "a.mp4", "caption": cell}, is_text=True)
    assert "the caption is" in bad.reason
