"""Prompt text as ids, with a toy encoder of one id per character."""

import pytest

from cogvideo.sequence.prompt import PromptFormat, left_pad

NEWLINE = 7


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_clip_text_is_length_line_break_caption() -> None:
    ids = PromptFormat().clip_text(encode, NEWLINE, 4, "一只猫", 64)
    assert ids == [*encode("4.0秒"), NEWLINE, *encode("一只猫")]


def test_clip_text_keeps_fractions_of_a_second() -> None:
    assert PromptFormat().clip_text(encode, NEWLINE, 0.5, "x", 64) == [*encode("0.5秒"), NEWLINE, *encode("x")]


def test_suffixes() -> None:
    prompt = PromptFormat()
    assert prompt.image_text(encode, "cat", 64) == encode("cat 高清摄影")
    assert prompt.clip_text(encode, NEWLINE, 2.0, "cat", 64, suffix=prompt.video_suffix)[-3:] == encode(" 视频")
    assert prompt.unconditional_text(encode, NEWLINE, 2.0, 64) == [*encode("2.0秒"), NEWLINE, *encode("视频")]


def test_line_breaks_in_a_caption_become_spaces() -> None:
    assert PromptFormat().image_text(encode, " a\r\n\tb\u2028c ", 64) == encode("a b c 高清摄影")


@pytest.mark.parametrize("caption", ["", "   ", "\n"])
def test_empty_prompt_is_an_error(caption: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        PromptFormat().clip_text(encode, NEWLINE, 4.0, caption, 64)
    with pytest.raises(ValueError, match="the prompt is empty"):
        PromptFormat().image_text(encode, caption, 64)


def test_a_prompt_may_just_fit() -> None:
    caption = "x" * (10 - len("4.0秒") - 1)
    assert len(PromptFormat().clip_text(encode, NEWLINE, 4.0, caption, 10)) == 10
    with pytest.raises(ValueError, match=r"takes 11 text tokens.*at most 10"):
        PromptFormat().clip_text(encode, NEWLINE, 4.0, caption + "x", 10)


def test_the_error_does_not_repeat_a_long_prompt_whole() -> None:
    with pytest.raises(ValueError) as error:
        PromptFormat().clip_text(encode, NEWLINE, 4.0, "long " * 1000, 64)
    assert len(str(error.value)) < 200


def test_left_pad_aligns_to_the_right() -> None:
    ids, mask = left_pad([[1, 2, 3], [4]], text_len=4, pad=0)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True]]
    assert (ids.dtype, mask.dtype) == ("int64", "bool")


def test_left_pad_of_a_full_row_pads_nothing() -> None:
    ids, mask = left_pad([[5, 6]], text_len=2, pad=0)
    assert ids.tolist() == [[5, 6]]
    assert mask.all()


@pytest.mark.parametrize("text", [[], [1, 2, 3]])
def test_left_pad_refuses_empty_and_long_texts(text: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"text has {len(text)} tokens, expected 1 to 2"):
        left_pad([text], text_len=2, pad=0)
