"""Readers of captions files: each format, each kind of bad line, and files that are refused."""

import json

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers import MAX_LINE_BYTES, open_captions


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def test_json_lines_with_spans(tmp_path):
    file = write(
        tmp_path / "c.jsonl",
        {"video": "a.mp4", "caption": "红色的\n数字 3"},
        "\n",
        {"video": "b/c.mp4", "caption": "x", "start": 2, "end": 6.5},
    )
    assert list(open_captions(file)) == [Caption("a.mp4", "红色的 数字 3"), Caption("b/c.mp4", "x", 2.0, 6.5)]


def test_tab_separated(tmp_path):
    assert list(open_captions(write(tmp_path / "c.tsv", "a.mp4\ta red digit\n"))) == [Caption("a.mp4", "a red digit")]


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "c.tsv").write_bytes(b"\xef\xbb\xbfa.mp4\tx\n")
    assert open_captions(tmp_path / "c.tsv").select([0])[0].video == "a.mp4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json\n", "not JSON"),
        ("[1]\n", "expected an object"),
        ({"video": "a.mp4"}, "caption=None"),
        ({"video": 3, "caption": "x"}, "video=3"),
        ({"video": "a.mp4", "caption": "  "}, "caption is empty"),
        ({"video": "", "caption": "x"}, "outside"),
        ({"video": "../a.mp4", "caption": "x"}, "outside"),
        ({"video": "/etc/passwd", "caption": "x"}, "outside"),
        ({"video": "a\0.mp4", "caption": "x"}, "outside"),
        ({"video": "a.mp4", "caption": "x", "strat": 1}, "unknown field 'strat'"),
        ({"video": "a.mp4", "caption": "x", "start": "1"}, "expected seconds"),
        ({"video": "a.mp4", "caption": "x", "start": True}, "expected seconds"),
        ({"video": "a.mp4", "caption": "x", "start": 3, "end": 3}, "start < end"),
        ({"video": "a.mp4", "caption": "x", "start": -1}, "0 <= start"),
        ({"video": "a.mp4", "caption": "x", "end": 10**400}, "larger than any video"),
        ({"video": "a.mp4", "caption": "\ud800"}, "lone surrogate"),
        ({"video": f"{'a' * 300}.mp4", "caption": "x"}, "a file name has at most 255 bytes"),
        ('{"video": "a.mp4", "caption": "x", "start": NaN}\n', "0 <= start"),
        ("[" * 20000 + "\n", "not JSON"),
        ("x" * (MAX_LINE_BYTES + 1), "longer than"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = write(tmp_path / "c.jsonl", {"video": "ok.mp4", "caption": "fine"}, line)
    with pytest.raises(ValueError, match=f"line 2: .*{message}") as caught:
        open_captions(file)
    assert "\n" not in str(caught.value)


def test_lines_can_be_read_again_by_position(tmp_path):
    lines = [{"video": f"{index}.mp4", "caption": f"数字 {index}"} for index in range(6)]
    captions = open_captions(write(tmp_path / "c.jsonl", lines[0], "\n", *lines[1:]))
    assert [caption.text for caption in captions.select([5, 0, 2])] == ["数字 5", "数字 0", "数字 2"]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, text):
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(ValueError, match="holds no captions"):
        open_captions(tmp_path / "c.jsonl")


def test_files_that_are_not_utf8_unknown_or_missing(tmp_path):
    (tmp_path / "c.tsv").write_bytes(b"a.mp4\t\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        open_captions(tmp_path / "c.tsv")
    with pytest.raises(ValueError, match=r"expected a captions file in \.jsonl or \.tsv, got '\.csv'"):
        open_captions(tmp_path / "c.csv")
    with pytest.raises(FileNotFoundError):
        open_captions(tmp_path / "none.jsonl")
