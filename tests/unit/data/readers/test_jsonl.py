"""JSON lines: values, each kind of bad line, positions."""

import json

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers import MAX_LINE_BYTES, open_captions


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def test_spans_and_further_fields(tmp_path):
    file = write(
        tmp_path / "c.jsonl",
        {"video": "a.mp4", "caption": "红色的\n数字 3"},
        "\n",
        {"video": "b/c.mp4", "caption": "x", "start": 2, "end": 6.5, "width": 640},
    )
    expected = [Caption("a.mp4", "红色的 数字 3"), Caption("b/c.mp4", "x", 2.0, 6.5, {"width": 640})]
    assert list(open_captions(file)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json\n", "not JSON"),
        ("[1]\n", "expected an object"),
        ("{}\n", "no video field"),
        ({"video": "a.mp4"}, "no caption field"),
        ({"video": 3, "caption": "x"}, "video=3"),
        ({"video": "a.mp4", "caption": "  "}, "caption is empty"),
        ({"video": "", "caption": "x"}, "outside"),
        ({"video": "../a.mp4", "caption": "x"}, "outside"),
        ({"video": "/etc/passwd", "caption": "x"}, "outside"),
        ({"video": "a\0.mp4", "caption": "x"}, "outside"),
        ({"video": "a.mp4", "caption": "x", "start": True}, "expected seconds"),
        ({"video": "a.mp4", "caption": "x", "start": 3, "end": 3}, "start < end"),
        ({"video": "a.mp4", "caption": "x", "start": -1}, "0 <= start"),
        ({"video": "a.mp4", "caption": "x", "end": 10**400}, "end is too large"),
        ({"video": "a.mp4", "caption": "\ud800"}, "lone surrogate"),
        ({"video": f"{'a' * 300}.mp4", "caption": "x"}, "a file name has at most 255 bytes"),
        ('{"video": "a.mp4", "caption": "x", "start": Infinity}\n', "0 <= start"),
        ("[" * 20000 + "\n", "not JSON"),
        ("x" * (MAX_LINE_BYTES + 1), "longer than"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = write(tmp_path / "c.jsonl", {"video": "ok.mp4", "caption": "fine"}, line)
    with pytest.raises(ValueError, match=f"line 2: .*{message}") as caught:
        open_captions(file)
    assert "\n" not in str(caught.value)
    assert [caption.video for caption in open_captions(file, skip_bad=True)] == ["ok.mp4"]


def test_missing_numbers_as_pandas_writes_them(tmp_path):
    line = '{"video": "a.mp4", "caption": "x", "start": NaN, "end": NaN, "fps": NaN}\n'
    assert list(open_captions(write(tmp_path / "c.jsonl", line))) == [Caption("a.mp4", "x", extra={"fps": None})]


def test_lines_can_be_read_again_by_position(tmp_path):
    lines = [{"video": f"{index}.mp4", "caption": f"数字 {index}"} for index in range(6)]
    captions = open_captions(write(tmp_path / "c.jsonl", lines[0], "\n", *lines[1:]))
    assert [caption.text for caption in captions.select([5, 0, 2])] == ["数字 5", "数字 0", "数字 2"]
