"""`cogvideo study` end to end: made, voted through in a headless browser, read."""

import json
import time
from pathlib import Path

import pytest

from cogvideo.cli.main import main
from cogvideo.evaluation.study import design
from cogvideo.evaluation.study.design import MAX_EMBEDDED_BYTES, System, make_study, open_system
from tests.helpers.browser import Browser, chromium, open_browser
from tests.helpers.study import PROMPTS, numbered, votes_file, write_systems, write_votes

needs_browser = pytest.mark.skipif(chromium() is None, reason="there is no Chromium")


def make(folder: Path, *words: str) -> Path:
    inputs = [str(path) for path in write_systems(folder, ("ours", "theirs"))]
    out = folder / "study"
    assert main(["study", "make", *inputs, "--prompts", str(folder / "prompts.txt"), "--out", str(out), *words]) == 0
    return out


def test_a_study_is_made_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = make(tmp_path, "--per-rater", "2", "--title", "哪个更好？")
    assert "3 pairs: 2 systems, 3 prompts; 2 per rater" in capsys.readouterr().out
    assert "哪个更好？" in (out / "page/study.html").read_text(encoding="utf-8")
    key = json.loads((out / "key.json").read_text(encoding="utf-8"))
    votes = [
        str(write_votes(tmp_path / f"{n}.json", votes_file(key, f"{n:016x}", [("first", "tie", "tie")] * 3)))
        for n in range(2)
    ]
    figures = tmp_path / "figures.json"
    assert main(["study", "read", *votes, "--key", str(out / "key.json"), "--json", str(figures)]) == 0
    assert "ours over theirs" in capsys.readouterr().out
    assert json.loads(figures.read_text(encoding="utf-8"))["questions"]["relevance"]["comparisons"][0]["ties"] == 6


def test_numbered_clips_are_of_the_lines_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = []

    def spy(out: Path, title: str, systems: list[System], prompts: list[str], **named: object) -> object:
        found.extend(systems)
        return make_study(out, title, systems, prompts, **named)

    monkeypatch.setattr(design, "make_study", spy)
    inputs = [str(path) for path in write_systems(tmp_path, ("ours", "theirs"), ["a cat", "", "a cat", "a dog"])]
    prompts = str(tmp_path / "prompts.txt")
    assert main(["study", "make", *inputs, "--prompts", prompts, "--out", str(tmp_path / "study")]) == 0
    for system in found:
        assert {prompt: path.name for prompt, path in system.videos.items()} == {
            "a cat": "0000.mp4",
            "a dog": "0003.mp4",
        }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["make", "ours", "--prompts", "prompts.txt", "--out", "o"], "two folders or more"),
        (["make", "ours", "ours", "--prompts", "prompts.txt", "--out", "o"], "the same name"),
        (["make", "ours", "nowhere", "--prompts", "prompts.txt", "--out", "o"], "nowhere is not a folder"),
        (["make", "ours", "x=theirs", "--prompts", "prompts.txt", "--out", "o", "--per-rater", "0"], "--per-rater 0"),
        (["make", "ours", "theirs", "--out", "o"], "needs --prompts"),
        (["make", "ours", "theirs", "--prompts", "prompts.txt", "--out", "ours"], "exists"),
        (["make", "ours", "theirs", "--prompts", "prompts.txt", "--out", "o", "--key", "k"], "takes no --key"),
        (["read", "votes.json"], "needs --key"),
        (["read", "votes.json", "--key", "k", "--per-rater", "2"], "takes no --per-rater"),
        (["read", "prompts.txt", "--key", "prompts.txt"], "not readable as JSON"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
):
    write_systems(tmp_path, ("ours", "theirs"))
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_clip_that_is_no_video_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours, theirs = write_systems(tmp_path, ("ours", "theirs"))
    (theirs / "0002.mp4").write_bytes(b"not a video")
    words = ["study", "make", str(ours), str(theirs), "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*words, "--out", str(tmp_path / "study")]) == 2
    assert "0002.mp4" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "prompts.txt", "theirs"]


def shown(browser: Browser) -> str:
    return browser.evaluate("document.getElementById('prompt').textContent")


def is_over(browser: Browser) -> bool:
    return browser.evaluate("!document.getElementById('end').hidden")


@needs_browser
@pytest.mark.parametrize("embedded", [True, False])
def test_a_study_is_voted_through_in_a_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str], embedded: bool):
    systems = [open_system(path.name, path, numbered(PROMPTS)) for path in write_systems(tmp_path, ("ours", "theirs"))]
    out = tmp_path / "study"
    make_study(out, "Which clip is better?", systems, PROMPTS, embed_up_to=MAX_EMBEDDED_BYTES if embedded else 0)
    assert (out / "page/videos").exists() != embedded
    key = json.loads((out / "key.json").read_text(encoding="utf-8"))
    playing = "['left', 'right'].every((side) => document.getElementById(side).currentTime > 0)"
    with open_browser(tmp_path / "browser") as browser:
        browser.resize(390, 844)
        browser.open((out / "page/study.html").as_uri())
        browser.press("ArrowLeft")  # nothing is asked yet
        browser.press("Enter")
        browser.wait_for(playing)
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
        seen = []
        for pair in range(3):
            seen.append(shown(browser))
            assert browser.evaluate("document.getElementById('count').textContent") == f"{pair + 1} of 3"
            browser.press("ArrowLeft")
            browser.press("ArrowRight")
            if pair == 1:  # taken back and given otherwise; the page keeps answers when it is loaded again
                browser.press("Backspace")
                browser.open((out / "page/study.html").as_uri())
                assert shown(browser) == seen[-1]
                browser.press("ArrowRight")
            browser.press("ArrowDown")
        assert sorted(seen) == sorted(PROMPTS) and is_over(browser)
        browser.press("Backspace")
        assert not is_over(browser)
        browser.press("ArrowDown")
        assert browser.evaluate("document.title") == "Which clip is better?" and browser.errors == []
        browser.press("Enter")  # the button to download has the focus
        for _ in range(100):
            files = list((tmp_path / "browser/downloads").glob("votes-*.json"))
            if files:
                break
            time.sleep(0.1)
    (file,) = files
    votes = json.loads(file.read_text(encoding="utf-8"))["votes"]
    assert {vote["trial"] for vote in votes} == {trial["id"] for trial in key["trials"]}
    for vote in votes:
        assert vote["quality"] == ("second" if vote["swapped"] else "first")
        assert vote["relevance"] == ("first" if vote["swapped"] else "second") and vote["motion"] == "tie"
    capsys.readouterr()
    assert main(["study", "read", str(file), "--key", str(out / "key.json")]) == 0
    assert "the left clip was preferred in 50.0 %" in capsys.readouterr().out
