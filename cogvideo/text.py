"""Checks all prompts and captions, whether from the command line, a file, standard input, the web page or Python.

A text is one line in Unicode's composed form (NFC), with single spaces and without invisible characters, so the same
words are the same prompt however they were typed or stored. Only `\\n`, `\\r\\n` and `\\r` end a line. Not here: how a
text becomes tokens (`sequence/prompt.py`, `tokenizers/text.py`).
"""

import codecs
import re
import unicodedata
from pathlib import Path

MAX_CHARACTERS = 1 << 16
"""Of one prompt or caption."""
MAX_PROMPT_FILE_BYTES = 16 << 20

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with UTF-16's mark, so it comes first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_LINE_END = re.compile(r"\r\n|\r|\n")
# Soft hyphen, zero-width space, direction marks, word joiner, byte order mark, annotation marks. The zero-width joiners
# U+200C and U+200D stay: they are part of the spelling of Persian, Indic scripts and emoji.
_INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but white space: tab, line ends, \v, \f, \x85
_SURROGATE = re.compile("[\ud800-\udfff]")


def marked_encoding(data: bytes) -> str | None:
    """The encoding that a text's byte order mark indicates; None without a mark."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)


def decode_text(data: bytes, place: str) -> str:
    """Decode UTF-8, dropping a byte order mark. `place` names the source in errors, such as a file.

    Raises: ValueError with the byte and its offset for any other encoding.
    """
    if (encoding := marked_encoding(data)) not in (None, "utf-8"):
        raise ValueError(
            f"{place} is not UTF-8 text but {encoding.upper()} (byte order mark at offset 0); save it as UTF-8"
        )
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{place} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}); "
            "save it as UTF-8"
        ) from None


def split_lines(text: str) -> list[str]:
    """Split at the line ends that editors write; `str.splitlines` also splits at `\\x0b`, `\\x85`, U+2028 and more."""
    return _LINE_END.split(text)


def normalise(text: str) -> str:
    """Put a text on one line: NFC, white space collapsed to single spaces, invisible characters removed."""
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).split())


def clean_text(text: str, name: str = "prompt") -> str:
    """Check and normalise a prompt or caption; `name` says which in errors.

    Raises: ValueError if it is empty, too long, or contains a control character or lone surrogate.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the {name} has {len(text)} characters or more; give at most {MAX_CHARACTERS}")
    if wrong := _SURROGATE.search(text):
        code, place = ord(wrong[0]), wrong.start() + 1
        if 0xDC80 <= code <= 0xDCFF:  # how Python passes undecodable bytes of arguments and stdin
            raise ValueError(f"the {name} is not UTF-8: byte 0x{code - 0xDC00:02x} at character {place}")
        raise ValueError(f"the {name} holds a lone surrogate (U+{code:04X}, half a character) at character {place}")
    if wrong := _CONTROL.search(text):
        code, place = ord(wrong[0]), wrong.start() + 1
        raise ValueError(f"the {name} holds a control character (U+{code:04X}) at character {place}; remove it")
    cleaned = normalise(text)
    if not cleaned:
        raise ValueError(f"the {name} is empty; describe the video in a few words")
    return cleaned


def split_prompts(text: str, place: str = "") -> list[str]:
    """Prompts in a text, one per line; blank lines are skipped. Raises: ValueError naming `place` and the line."""
    return [prompt for _, prompt in _numbered_prompts(text, place)]


def _numbered_prompts(text: str, place: str) -> list[tuple[int, str]]:
    """Prompts with their line numbers, counted from 0."""
    prompts = []
    for number, line in enumerate(split_lines(text)):
        try:
            if normalise(line):
                prompts.append((number, clean_text(line)))
        except ValueError as error:
            raise ValueError(f"{place} line {number + 1}: {error}".lstrip()) from None
    return prompts


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a UTF-8 text file, one per line, skipping blank lines. Raises: ValueError, OSError."""
    return [prompt for _, prompt in read_numbered_prompts(path)]


def read_numbered_prompts(path: Path) -> list[tuple[int, str]]:
    """Like `read_prompts`, with the line number of each prompt in the file, counted from 0."""
    with open(path, "rb") as file:
        data = file.read(MAX_PROMPT_FILE_BYTES + 1)
    if len(data) > MAX_PROMPT_FILE_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_PROMPT_FILE_BYTES} bytes; expected a text file, one prompt per line"
        )
    prompts = _numbered_prompts(decode_text(data, str(path)), str(path))
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one per line")
    return prompts


LANGUAGES = ("Chinese", "English", "other")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTER = re.compile(r"[^\W\d_]")


def language(text: str) -> str:
    """One of LANGUAGES: Chinese if any letter of the text is, else English if all are unaccented Latin, else other."""
    if _CHINESE.search(text):
        return "Chinese"
    letters = _LETTER.findall(text)
    return "English" if letters and all(letter.isascii() for letter in letters) else "other"
