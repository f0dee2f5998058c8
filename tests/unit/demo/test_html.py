"""What is put on the page: every word of a visitor as text, and addresses that change with what they show."""

from dataclasses import replace
from pathlib import Path

from cogvideo.demo.html import cards, clock, progress
from cogvideo.demo.service import Shown

FOLDER = Path("/out/000-a")
CAPTION = '<img src=x onerror="alert(1)">'
SHOWN = Shown("1 clip of 5 frames, 1 a second", FOLDER, (CAPTION,), ("000-一",), 1000, 250, 2.0)


def test_words_of_visitors_are_text() -> None:
    shown = replace(SHOWN, files={FOLDER / "000-一.png": 1})
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in cards(shown) and CAPTION not in cards(shown)


def test_addresses_change_with_what_they_show() -> None:
    assert "<video" not in cards(replace(SHOWN, files={FOLDER / "000-一.png": 1}))
    page = cards(replace(SHOWN, files={FOLDER / "000-一.png": 3, FOLDER / "000-一.mp4": 2}))
    assert '<video src="gradio_api/file=/out/000-a/000-%E4%B8%80.mp4?2"' in page
    assert 'src="gradio_api/file=/out/000-a/000-%E4%B8%80.png?3"' in page
    assert "tokens" not in page
    done = replace(SHOWN, files={FOLDER / "tokens.safetensors": 1}, finished=True)
    assert 'href="gradio_api/file=/out/000-a/tokens.safetensors?1" download="tokens.safetensors">tokens' in cards(done)


def test_progress() -> None:
    assert "250 of 1,000 tokens, 125 a second, 0:06 left" in progress(SHOWN)
    assert "a second, " not in progress(replace(SHOWN, drawn=0, seconds=0.0)).split("tokens")[1]
    assert "done. Kept in out/000-a" in progress(replace(SHOWN, finished=True))
    assert [clock(seconds) for seconds in (0.4, 59.6, 750, 3750)] == ["0:00", "1:00", "12:30", "1:02:30"]
