"""Encodings, byte order marks and line ends of text files."""

import pytest

from cogvideo.data.readers import ReadOptions, open_captions

TEXTS = {
    "utf-16": "两个圆在动",
    "utf-16-le": "a red digit",
    "utf-32": "两个圆在动",
    "utf-8-sig": "un café",
    "cp1252": "un café très “élégant”",
    "gb18030": "红色的数字三向左移动",
    "shift_jis": "赤い数字が左に動く",
    "cp1251": "собака бежит по траве",
}


def write(path, encoding, caption):
    path.write_bytes(f"video,caption\r\na.mp4,{caption}\r\nb.mp4,plain\r\n".encode(encoding))
    return path


@pytest.mark.parametrize("encoding", TEXTS)
def test_a_named_encoding_is_read(tmp_path, encoding):
    file = write(tmp_path / "c.csv", encoding, TEXTS[encoding])
    captions = open_captions(file, ReadOptions(encoding=encoding))
    assert [caption.text for caption in captions] == [TEXTS[encoding], "plain"]
    assert captions.select([1, 0])[1].text == TEXTS[encoding]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("given", [None, "utf-8", "cp1252"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding, given):
    file = write(tmp_path / "c.csv", encoding, TEXTS[encoding])
    assert next(iter(open_captions(file, ReadOptions(encoding=given)))).text == TEXTS[encoding]


@pytest.mark.parametrize("encoding", ["cp1252", "gb18030", "shift_jis", "cp1251", "utf-16-le", "utf-16-be"])
def test_another_encoding_is_named_with_the_remedy(tmp_path, encoding):
    file = write(tmp_path / "c.csv", encoding, TEXTS.get(encoding, "plain"))
    with pytest.raises(ValueError, match=f"c.csv.*: not UTF-8 text, probably {encoding}.*; give --encoding {encoding}"):
        open_captions(file, skip_bad=True)


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(
        b'{"video": "a.mp4", "caption": "x"}\n{"video": "a.mp4", "caption": "caf\xe9 x"}\n'
    )
    with pytest.raises(ValueError, match=r"c\.jsonl line 2: not UTF-8 text, probably cp1252"):
        open_captions(tmp_path / "c.jsonl")


@pytest.mark.parametrize("name", ["utf-9", "rot13", "hex", "a\0b"])
def test_an_unknown_encoding(tmp_path, name):
    with pytest.raises(ValueError, match=r"--encoding .*; try utf-8, utf-16, cp1252"):
        open_captions(write(tmp_path / "c.csv", "utf-8", "x"), ReadOptions(encoding=name))


def test_an_encoding_that_does_not_fit(tmp_path):
    file = write(tmp_path / "c.csv", "cp1252", TEXTS["cp1252"])
    with pytest.raises(ValueError, match="not ASCII text, probably cp1252"):
        open_captions(file, ReadOptions(encoding="ascii"))


@pytest.mark.parametrize(
    ("data", "message"), [(b"PK\x03\x04xx", "workbook"), (b"\x1f\x8bxx", "gunzip"), (b"PAR1", "Parquet")]
)
def test_files_that_are_no_text(tmp_path, data, message):
    (tmp_path / "c.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_captions(tmp_path / "c.csv")
