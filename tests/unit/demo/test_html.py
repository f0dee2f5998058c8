"""The page's HTML: visitors' text is escaped, and URLs change with the file behind them."""

from dataclasses import replace
from pathlib import Path

from cogvideo.demo.html import clip_cards, clock, notes, progress_line, waiting_line
from cogvideo.demo.places import Limits
from cogvideo.demo.service import Progress

FOLDER = Path("/out/000-a")
CAPTION = '<img src=x onerror="alert(1)">'
PROGRESS = Progress("1 clip of 5 frames, 1 per second", FOLDER, (CAPTION,), ("000-一",), 1000, 250, 2.0)


def test_text_of_visitors_is_escaped() -> None:
    shown = replace(PROGRESS, files={FOLDER / "000-一.png": 1})
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in clip_cards(shown) and CAPTION not in clip_cards(shown)


def test_urls_change_with_every_version_of_a_file() -> None:
    assert "<video" not in clip_cards(replace(PROGRESS, files={FOLDER / "000-一.png": 1}))
    page = clip_cards(replace(PROGRESS, files={FOLDER / "000-一.png": 3, FOLDER / "000-一.mp4": 2}))
    assert '<video src="gradio_api/file=/out/000-a/000-%E4%B8%80.mp4?2"' in page
    assert 'src="gradio_api/file=/out/000-a/000-%E4%B8%80.png?3"' in page
    assert "tokens" not in page
    done = replace(PROGRESS, files={FOLDER / "tokens.safetensors": 1}, finished=True)
    assert 'href="gradio_api/file=/out/000-a/tokens.safetensors?1" download="tokens.safetensors">tokens' in clip_cards(
        done
    )


def test_a_large_clip_takes_the_place_of_the_clip_once_it_is_there() -> None:
    """Whose files can still be downloaded."""
    names = {"video": "000-一.mp4", "frames": "000-一.png", "tokens": "tokens.safetensors"}
    small = replace(PROGRESS, files={FOLDER / name: 1 for name in names.values()}, finished=True)
    large = replace(PROGRESS, folder=FOLDER / "large", small=small)
    assert "1 per second, large: 250 of 1,000 tokens" in progress_line(large)
    begun = clip_cards(large)
    assert '<video src="gradio_api/file=/out/000-a/000-%E4%B8%80.mp4?1"' in begun and "large" not in begun
    done = clip_cards(replace(large, files={FOLDER / "large" / name: 1 for name in names.values()}, finished=True))
    assert '<video src="gradio_api/file=/out/000-a/large/000-%E4%B8%80.mp4?1"' in done and done.count("<video") == 1
    for links, folder in zip(done.split("<span>large:</span>"), ("/out/000-a", "/out/000-a/large"), strict=True):
        for label, name in names.items():
            quoted = name.replace("一", "%E4%B8%80")
            assert f'href="gradio_api/file={folder}/{quoted}?1" download="{name}">{label}</a>' in links


def test_urls_below_the_path_of_a_proxy() -> None:
    shown = replace(PROGRESS, files={FOLDER / "000-一.png": 3})
    assert 'src="/video/gradio_api/file=/out/000-a/' in clip_cards(shown, "/video")


def test_what_is_said_about_disk_space_and_waiting() -> None:
    assert "take more than 10 GB, the oldest are removed" in notes(Limits())
    assert "take more than 250 MB, the oldest" in notes(Limits(disk_bytes=250 * 10**6))
    assert "Waiting: position 2 in the queue" in waiting_line(2)
    waiting = progress_line(replace(PROGRESS, waiting=True))
    assert "1 clip of 5 frames, 1 per second: waiting for clips with other adapters" in waiting


def test_progress() -> None:
    assert "250 of 1,000 tokens, 125 per second, 0:06 left" in progress_line(PROGRESS)
    assert "per second, " not in progress_line(replace(PROGRESS, drawn_tokens=0, seconds=0.0)).split("tokens")[1]
    assert "done. Saved in out/000-a" in progress_line(replace(PROGRESS, finished=True))
    assert [clock(seconds) for seconds in (0.4, 59.6, 750, 3750)] == ["0:00", "1:00", "12:30", "1:02:30"]
