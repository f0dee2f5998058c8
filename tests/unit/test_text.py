"""Prompts and captions from outside: decoding, line ends, normalisation, and what is refused in one line."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.text import (
    MAX_CHARACTERS,
    clean_text,
    decode_text,
    language,
    normalise,
    read_prompts,
    split_lines,
    split_prompts,
)
from cogvideo.tokenizers.text import TextTokenizer
from cogvideo.worlds.digits.benchmark import draw_captions

ORDINARY = [
    *(caption.text for caption in draw_captions(50, seed=0)),
    "A café at dusk, über-slow zoom — “quoted”, it's 50 % done… №5 x² ½ ﬁ",
    "夜晚的城市，霓虹灯“闪烁”。",
    "東京の夜、ネオンが光る",
    "서울의 밤거리",
    "शहर की रात क्‍ष",
    "می‌خواهم یک ویدیو",
    "مدينة في الليل",
    "เมืองยามค่ำคืน",
    "a family 👨‍👩‍👧 and a ❤️",
]
BUNDLED = TextTokenizer.load(BUNDLED_WEIGHTS / "text.model")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert clean_text(text) == text


@pytest.mark.parametrize("text", ORDINARY)
def test_decomposed_text_is_the_same_prompt_with_the_same_tokens_as_before(text: str) -> None:
    decomposed = unicodedata.normalize("NFD", text)
    assert clean_text(decomposed) == text
    assert BUNDLED.encode(clean_text(decomposed)) == BUNDLED.encode(text) == BUNDLED.encode(decomposed)


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("space", list(" \t\n\r\x0b\x0c\x85\xa0\u2003\u2028\u2029\u202f\u3000"))
def test_white_space_is_a_single_space(space: str) -> None:
    assert clean_text(f"{space}a red{space} {space}digit{space}") == "a red digit"


@pytest.mark.parametrize("mark", list("\ufeff\u200b\u00ad\u2060\u200e\u200f\u061c\u202a\u202e\u2066\u2069"))
def test_invisible_characters_are_removed(mark: str) -> None:
    assert clean_text(f"{mark}a r{mark}ed digit{mark}") == "a red digit"


@pytest.mark.parametrize("code", [*range(9), *range(0x0E, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0)])
def test_control_characters_are_refused_by_name_and_place(code: int) -> None:
    with pytest.raises(ValueError, match=f"the prompt holds a control character .U.{code:04X}. at character 3"):
        clean_text(f"a {chr(code)}red digit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the caption is empty; describe"),
        (" \t\u3000", "is empty"),
        ("\u200b\ufeff", "is empty"),
        ("a \ud83d", r"lone surrogate \(U\+D83D, half a character\) at character 3"),
        ("caf\udce9", "the caption is not UTF-8: byte 0xe9 at character 4"),
        ("a" * (MAX_CHARACTERS + 1), "65537 characters or more; give at most 65536"),
    ],
)
def test_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        clean_text(text, "caption")
    assert "\n" not in str(error.value)


def test_only_the_line_ends_of_editors_end_a_line() -> None:
    assert split_lines("a\nb\r\nc\rd") == ["a", "b", "c", "d"]
    for other in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029":
        assert split_lines(f"a{other}b") == [f"a{other}b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("é".encode("latin-1"), r"byte 0xe9 at offset 0 \(line 1\); save it as UTF-8"),
        (b"\xef\xbb\xbfgood\r\nba\xffd", r"byte 0xff at offset 11 \(line 2\); save it as UTF-8"),
        ("数字".encode("gb18030"), "byte 0xca at offset 0"),
        ("a".encode("utf-16"), r"not UTF-8 text but UTF-16 .byte order mark at offset 0.; save it as UTF-8"),
        (b"\xfe\xff\0a", "but UTF-16"),
        ("a".encode("utf-32"), "but UTF-32"),
        (b"\xed\xa0\xbd", "byte 0xed at offset 0"),  # half a character, as some programs write it
    ],
)
def test_other_encodings_are_named_with_the_file_and_the_byte(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path} is .*{message}"):
        read_prompts(path)


def test_a_byte_order_mark_is_no_text() -> None:
    assert decode_text(b"\xef\xbb\xbfa", "x") == "a"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_one_prompt_per_line_of_a_file(tmp_path: Path, end: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(["a\u2028b", "", " \u200b ", "数字 \x0c"]).encode())
    assert read_prompts(path) == ["a b", "数字"]


def test_the_line_of_a_bad_prompt_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^line 3: the prompt holds a control character \(U\+001B\)"):
        split_prompts("a\n\nb\x1b[D")
    path = tmp_path / "none.txt"
    path.write_text("\ufeff\n \n")
    with pytest.raises(ValueError, match="holds no prompt; write one per line"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a dog", "English"), ("一只狗 runs", "Chinese"), ("été", "other"), ("123 !", "other"), ("бег", "other")],
)
def test_language_follows_from_the_letters(text: str, expected: str) -> None:
    assert language(text) == expected
