"""Making a study: clips are found, the page names no system, the key notices changes."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideo.evaluation.study.design import even_frames, make_key, make_study, open_system, read_key
from cogvideo.evaluation.study.page import script_json
from cogvideo.files import write_json
from cogvideo.media.video import read_video
from tests.helpers.study import HOSTILE, PROMPTS, numbered, write_systems

NAMES = ("our-secret-method", "their-baseline")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    systems = [open_system(path.name, path, numbered(PROMPTS)) for path in write_systems(folder, NAMES)]
    key, notes = make_study(folder / "study", "Which <b>one</b>?", systems, PROMPTS)
    assert notes == [] and len(key["trials"]) == 3
    return folder / "study"


def page_of(study: Path) -> str:
    return (study / "page" / "study.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def test_the_page_is_one_file_that_names_no_system(study: Path):
    assert [path.name for path in (study / "page").iterdir()] == ["study.html"]
    page = page_of(study)
    for word in (*NAMES, "secret", 'first":', "0000.mp4"):
        assert word not in page.partition("<script>\n")[0], word
    key = read_key(study / "key.json")
    assert key["systems"] == list(NAMES)
    assert not any(key["secret"] in text for text in (page, *map(decoded, embedded(page))))


def embedded(page: str) -> list[str]:
    return re.findall(r'<script type="text/plain" id="clip-[0-9a-f]{16}">([^<]*)</script>', page)


def decoded(text: str) -> str:
    return base64.b64decode(text).decode("latin-1")


def test_embedded_clips_play_and_carry_no_names(study: Path, tmp_path: Path):
    clips = embedded(page_of(study))
    assert len(clips) == 2 * len(PROMPTS)
    for clip in clips:
        (tmp_path / "clip.mp4").write_bytes(base64.b64decode(clip))
        frames, seconds = read_video(tmp_path / "clip.mp4")
        assert frames.shape == (4, 16, 16, 3) and seconds[-1] == pytest.approx(0.75)
        assert not any(name in decoded(clip) for name in NAMES)


def test_captions_are_data_and_only_the_pages_own_script_may_run(study: Path):
    page = page_of(study)
    assert sorted({trial["prompt"] for trial in data_of(page)["trials"]}) == sorted(PROMPTS)
    assert "owned" in page and '<script>document.title="owned"' not in page and "<img" not in page
    assert "<b>one</b>" not in page and "Which &lt;b&gt;one&lt;/b&gt;?" in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    script = page.partition("<script>")[2].partition("</script>")[0]
    expected = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{expected}'" in policy and "://" not in page


def test_script_json_cannot_end_its_element():
    text = script_json([HOSTILE, "\u2028", "<!--"])
    assert json.loads(text) == [HOSTILE, "\u2028", "<!--"] and not set("<>&\u2028") & set(text)


def test_large_studies_keep_clips_beside_the_page_under_random_names(tmp_path: Path):
    systems = [open_system(path.name, path, numbered(PROMPTS)) for path in write_systems(tmp_path, NAMES)]
    make_study(tmp_path / "study", "t", systems, PROMPTS, embed_up_to=100, per_rater=2)
    page = page_of(tmp_path / "study")
    names = {name for trial in data_of(page)["trials"] for name in trial["clips"]}
    assert {path.stem for path in (tmp_path / "study/page/videos").iterdir()} == names and len(names) == 6
    assert {path.stat().st_mtime for path in (tmp_path / "study/page/videos").iterdir()} == {0}
    assert embedded(page) == [] and data_of(page)["perRater"] == 2


def test_sides_and_order_are_random_and_all_pairs_occur():
    key = make_key("t", ["a", "b", "c"], [str(number) for number in range(50)])
    pairs = {(trial["prompt"], *sorted((trial["first"], trial["second"]))) for trial in key["trials"]}
    assert len(pairs) == len(key["trials"]) == 150
    assert 40 < sum(trial["first"] < trial["second"] for trial in key["trials"]) < 110
    assert [trial["prompt"] for trial in key["trials"]] != sorted(trial["prompt"] for trial in key["trials"])


@pytest.mark.parametrize("change", [{"systems": ["x", "y"]}, {"title": "other"}, {"secret": "0"}])
def test_a_changed_key_is_refused(study: Path, tmp_path: Path, change: dict):
    write_json(tmp_path / "key.json", {**read_key(study / "key.json"), **change})
    with pytest.raises(ValueError, match="was changed since the study was made"):
        read_key(tmp_path / "key.json")


def test_a_folder_of_samples_says_which_clip_is_whose(tmp_path: Path):
    folder = write_systems(tmp_path, ["ours"])[0]
    samples = [
        {"name": "0002", "prompt": PROMPTS[0], "number": 1},
        {"name": "0001", "prompt": PROMPTS[0], "number": 0},
        {"name": "../ours/0000", "prompt": PROMPTS[1], "number": 0},
        {"name": "0000", "prompt": PROMPTS[1], "number": 1},
    ]
    write_json(folder / "samples.json", {"samples": samples})
    videos = open_system("ours", folder, numbered(PROMPTS[:2])).videos
    assert {prompt: path.name for prompt, path in videos.items()} == {PROMPTS[0]: "0001.mp4", PROMPTS[1]: "0000.mp4"}


def test_clips_are_found_by_their_prompt(tmp_path: Path):
    folder = write_systems(tmp_path, ["ours"])[0]
    (folder / "0001.mp4").rename(folder / f"{PROMPTS[1]}-0.mp4")
    (folder / "0000.mp4").rename(folder / f"{PROMPTS[0]}.mp4")
    videos = open_system("ours", folder, numbered(PROMPTS)).videos
    assert [path.name for path in videos.values()] == [f"{PROMPTS[0]}.mp4", f"{PROMPTS[1]}-0.mp4", "0002.mp4"]


def test_a_missing_clip_is_named_by_its_prompt(tmp_path: Path):
    folder = write_systems(tmp_path, ["ours"])[0]
    (folder / "0001.mp4").unlink()
    with pytest.raises(ValueError, match=r"no clip for 1 of 3 prompts, first '一只猫"):
        open_system("ours", folder, numbered(PROMPTS))


def test_systems_with_clips_of_another_shape_are_reported(tmp_path: Path):
    write_systems(tmp_path, ["small"], PROMPTS[:1])
    write_systems(tmp_path, ["large"], PROMPTS[:1], side=32)
    systems = [open_system(name, tmp_path / name, numbered(PROMPTS[:1])) for name in ("small", "large")]
    _, notes = make_study(tmp_path / "study", "t", systems, PROMPTS[:1])
    assert len(notes) == 1 and "16x16" in notes[0] and "32x32" in notes[0]


def test_even_frames_keep_regular_times_and_take_the_nearest_of_others():
    same, fps = even_frames(np.array([0.0, 0.33, 0.67, 1.0, 1.33]))
    assert same.tolist() == [0, 1, 2, 3, 4] and fps == pytest.approx(3, abs=0.01)
    uneven, _ = even_frames(np.array([0.0, 0.1, 0.2, 0.3, 4.0]))
    assert uneven.tolist() == [0, 3, 3, 4, 4]
    assert [found.tolist() if index == 0 else found for index, found in enumerate(even_frames(np.zeros(1)))] == [[0], 1]


def test_clips_of_any_size_are_written_frame_by_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pictures = [Image.fromarray(np.full((18, 32, 3), 50 * number, np.uint8)) for number in range(5)]
    durations = [100, 100, 100, 3700, 100]  # milliseconds: frames are left out and repeated
    for name in NAMES:
        (tmp_path / name).mkdir()
        pictures[0].save(
            tmp_path / name / "0000.gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0
        )
    monkeypatch.setitem(read_video.__kwdefaults__, "max_bytes", 1)
    systems = [open_system(name, tmp_path / name, numbered(PROMPTS[:1])) for name in NAMES]
    make_study(tmp_path / "study", "t", systems, PROMPTS[:1], embed_up_to=0)
    monkeypatch.undo()
    for clip in (tmp_path / "study/page/videos").iterdir():
        frames, seconds = read_video(clip)
        assert frames.shape == (5, 18, 32, 3) and seconds[-1] == pytest.approx(4, abs=0.01)
        assert np.abs(frames.mean(axis=(1, 2, 3)) - [0, 150, 150, 200, 200]).max() < 4
