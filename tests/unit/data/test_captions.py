"""Captions by index and by video, from any reader."""

import unicodedata
from itertools import pairwise

import pytest

from cogvideo.data.captions import BadRecord, Caption, CaptionsFile, plain_path, validated


class ListReader:
    """A reader of a format in which positions are row numbers, counted from the end."""

    def __init__(self, captions):
        self.captions = captions

    def scan(self):
        return ((len(self.captions) - row, caption) for row, caption in enumerate(self.captions))

    def read(self, positions):
        return (self.captions[len(self.captions) - position] for position in positions)


def test_captions_by_index_and_by_video(tmp_path):
    names = ["b", "a", "c", "a", "b", "a"]
    given = [Caption(f"{name}.mp4", f"数字 {index}") for index, name in enumerate(names)]
    captions = CaptionsFile(tmp_path / "captions.list", ListReader(given))
    assert len(captions) == 6 and list(captions) == given
    assert captions.select([5, 0, 2]) == [given[5], given[0], given[2]]
    indices, starts = captions.group_by_video()
    assert [indices[a:b].tolist() for a, b in pairwise(starts)] == [[0, 4], [1, 3, 5], [2]]


def test_bad_records_beyond_a_number_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideo.data.captions.MAX_BAD", 3)
    good, bad = Caption("a.mp4", "x"), BadRecord("line 2", "no caption")
    assert len(CaptionsFile(tmp_path / "c.list", ListReader([good, *[bad] * 3]), skip_bad=True).bad) == 3
    with pytest.raises(ValueError, match=r"c\.list has more than 3 bad records, the first is line 2: no caption"):
        CaptionsFile(tmp_path / "c.list", ListReader([good, *[bad] * 4]), skip_bad=True)


def test_the_hash_depends_on_captions_only(tmp_path):
    given = [Caption("a.mp4", "x", 1.0, 2.0), Caption("b.mp4", "y")]
    one, other, reverse = (
        CaptionsFile(tmp_path / name, ListReader(captions))
        for name, captions in (("one", given), ("other", list(given)), ("reverse", given[::-1]))
    )
    assert one.sha256 == other.sha256 != reverse.sha256


def test_validation_collapses_whitespace_and_keeps_the_path():
    assert validated(Caption("a/../b.mp4", " two\n lines ", 1.0)) == Caption("a/../b.mp4", "two lines", 1.0)
    with pytest.raises(ValueError, match="start < end"):
        validated(Caption("a.mp4", "x", 2.0, 1.0))


def test_two_spellings_of_a_path_are_held_out_together(tmp_path):
    names = [f"p/{number}-caf\u00e9.mp4" for number in range(20)]
    other = [unicodedata.normalize("NFD", name).replace("/", "\\") + " " for name in names]
    given = [Caption(name, "x") for pair in zip(names, other, strict=True) for name in pair]
    parts = CaptionsFile(tmp_path / "captions.list", ListReader(given)).split(0.5)
    training, held_out = ({plain_path(caption.video) for caption in part} for part in parts)
    assert len(training) == len(held_out) == 10 and not training & held_out
