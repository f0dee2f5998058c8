"""Contact sheets: every frame is visible, captions in any script, and sheets that are refused."""

import numpy as np
import pytest
from PIL import Image

from cogvideo.media import contact_sheet as sheets
from cogvideo.media.contact_sheet import contact_sheet


def noise(count, side=16, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, side, side, 3)).astype(np.uint8)


def test_a_sheet_shows_every_frame(tmp_path):
    rows = [noise(5), noise(3, seed=1)]
    contact_sheet(tmp_path / "s.png", rows, ["one", "two"])
    found = np.array(Image.open(tmp_path / "s.png"))
    for row in rows:
        for frame in row:
            tops, lefts = np.nonzero((found == frame[0, 0]).all(-1))
            assert any(
                (found[y : y + 16, x : x + 16] == frame).all()
                for y, x in zip(tops, lefts, strict=True)
                if y + 16 <= found.shape[0] and x + 16 <= found.shape[1]
            )


@pytest.fixture
def no_system_fonts(monkeypatch):
    monkeypatch.setattr(sheets, "FONT_FOLDERS", ())
    sheets._fonts.cache_clear()
    yield
    sheets._fonts.cache_clear()


CAPTIONS = ["红色的数字3向左快速移动", "", "x" * 5000, "a\ud800\x00🎬", "two\nlines", "un café → Москва"]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_any_caption_can_be_drawn(tmp_path, caption):
    contact_sheet(tmp_path / "s.png", [noise(2)], [caption])
    assert Image.open(tmp_path / "s.png").size[0] < 60


@pytest.mark.parametrize("caption", CAPTIONS)
def test_any_caption_can_be_drawn_without_system_fonts(tmp_path, caption, no_system_fonts):
    test_any_caption_can_be_drawn(tmp_path, caption)


@pytest.mark.parametrize(
    ("caption", "drawn"),
    [
        ("红色的数字3向左快速移动", "[caption 7]"),
        ("real: 红色的数字3", "real: [caption 7]"),
        ("the red digit 3", "the red digit 3"),
        ("un café → Москва", "un café → Москва"),
    ],
)
def test_a_caption_without_a_font_is_numbered(caption, drawn, no_system_fonts):
    text, _, _ = sheets._drawable(caption, 7, 400)
    assert text == drawn


def test_empty_and_oversized_sheets_are_refused(tmp_path):
    for rows, captions, message in [
        ([], None, "no frames"),
        ([noise(0)], None, "no frames"),
        ([noise(2)], [], "one each"),
    ]:
        with pytest.raises(ValueError, match=message):
            contact_sheet(tmp_path / "s.png", rows, captions)
    with pytest.raises(ValueError, match="too large"):
        contact_sheet(tmp_path / "s.png", [noise(1)], scale=1000)
    assert not (tmp_path / "s.png").exists()


def test_sheets_over_time_show_what_changes_once_per_sheet(tmp_path):
    real, made = noise(3), [noise(3, seed=seed) for seed in range(1, 13)]
    paths = [tmp_path / f"step_{number:02d}.png" for number in range(12)]
    for number, path in enumerate(paths):
        contact_sheet(path, [real, made[number]], ["real", f"step {number}"])
    sheets.sheets_over_time(tmp_path / "over.png", paths)
    found = np.array(Image.open(tmp_path / "over.png"))
    frames = [real[0], *(made[number][0] for number in (0, 2, 3, 5, 6, 8, 9, 11))]
    tops = [np.flatnonzero((found[:, sheets.GAP] == frame[0, 0]).all(-1)) for frame in frames]
    places = [
        next(y for y in ys if np.array_equal(found[y : y + 16, 2:18], frame))
        for ys, frame in zip(tops, frames, strict=True)
    ]
    assert places == sorted(places) and len(set(np.diff(places))) == 1
    assert found.shape[0] == 9 * (16 + sheets.LINE_HEIGHT + 2 * sheets.GAP)


def test_sheets_of_other_rows_are_left_out_of_those_over_time(tmp_path):
    for number, count in enumerate((2, 3, 3)):
        contact_sheet(tmp_path / f"{number}.png", [noise(count, seed=number)])
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    sheets.sheets_over_time(tmp_path / "none.png", paths[:2])
    assert not (tmp_path / "none.png").exists()
    sheets.sheets_over_time(tmp_path / "over.png", paths)
    assert Image.open(tmp_path / "over.png").height == 2 * (16 + sheets.GAP)
