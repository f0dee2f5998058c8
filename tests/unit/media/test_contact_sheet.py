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
