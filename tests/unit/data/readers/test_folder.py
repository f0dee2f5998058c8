"""Texts beside videos, at any depth."""

import json
import unicodedata

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers import ReadOptions, open_captions


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_each_kind_of_text(tmp_path):
    write(
        tmp_path,
        b_mp4="",
        b_txt="\ufeffa dog\r\nruns\r\n",
        a__c_MOV="",
        a__c_caption="a boat",
        d_webm="",
        d_json=json.dumps({"caption": ["x", "y"], "start": 1, "video": "elsewhere", "width": 8}),
        e_mp4="",
        e_json='["z"]',
        notes_txt="no video of this name",
        _f_mp4="",
    )
    captions = open_captions(tmp_path)
    extra = {"video": "elsewhere", "width": 8}
    expected = [
        Caption("a/c.MOV", "a boat"),
        Caption("b.mp4", "a dog runs"),
        Caption("d.webm", "x", 1.0, extra=extra),
        Caption("d.webm", "y", 1.0, extra=extra),
        Caption("e.mp4", "z"),
    ]
    assert list(captions) == expected and captions.folder == tmp_path
    assert captions.select([4, 0, 3]) == [expected[4], expected[0], expected[3]]


def test_a_txt_beside_a_json_is_the_caption(tmp_path):
    write(tmp_path, a_mp4="", a_txt="x", a_json='{"caption": "y", "title": "z", "end": 2.5}')
    assert list(open_captions(tmp_path)) == [Caption("a.mp4", "x", 0.0, 2.5, {"caption": "y", "title": "z"})]


def test_a_field_that_is_named(tmp_path):
    write(tmp_path, a_mp4="", a_json='{"caption": "y", "title": "z"}')
    with pytest.raises(ValueError, match=r"a\.mp4: its \.json: .* choose with --caption-column"):
        open_captions(tmp_path)
    assert next(iter(open_captions(tmp_path, ReadOptions(caption="title")))).text == "z"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no caption beside it; expected the same name with .txt, .caption, .json"),
        ({"a_txt": " "}, "the caption is empty"),
        ({"a_txt": "x", "a_caption": "y"}, "it has both .txt and .caption beside it"),
        ({"a_json": "{"}, "its .json is not JSON"),
        ({"a_json": "[" * 100_000}, "its .json is not JSON"),
        ({"a_json": "3"}, "its .json is not an object"),
        ({"a_json": '{"tags": []}'}, "no caption beside it"),
        ({"a_txt": b"caf\xe9 x"}, "a.txt: not UTF-8 text, probably cp1252"),
        ({"a_txt": "x" * (1 << 21)}, "larger than 1048576 bytes"),
    ],
)
def test_a_video_without_a_usable_text_is_skipped(tmp_path, files, reason):
    write(tmp_path, a_mp4="", b_mp4="", b_txt="fine", **files)
    captions = open_captions(tmp_path, skip_bad=True)
    assert [caption.video for caption in captions] == ["b.mp4"]
    assert captions.bad[0].place == "a.mp4" and reason in captions.bad[0].reason


def test_links_that_lead_out_and_names_that_are_not_text(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = write(tmp_path / "videos", a_mp4="", b_mp4="", b_txt="fine")
    (folder / "a.txt").symlink_to(tmp_path / "secret")
    with open(bytes(folder) + b"/\xff.mp4", "wb"), open(bytes(folder) + b"/\xff.txt", "w") as file:
        file.write("x")
    captions = open_captions(folder, skip_bad=True)
    assert [caption.video for caption in captions] == ["b.mp4"]
    reasons = captions.bad_reasons()
    assert "a.txt is a link that leads out" in reasons[0] and "lone surrogate" in reasons[1]
    "".join(reasons).encode()


def test_a_folder_without_videos(tmp_path):
    with pytest.raises(ValueError, match=r"holds no videos; expected NAME\.mp4 with NAME\.txt beside it"):
        open_captions(write(tmp_path, a_txt="x"))
    (tmp_path / "b").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"metadata\.csv; b is a link to a folder, which is not followed"):
        open_captions(tmp_path)


def test_links_to_folders_are_reported(tmp_path):
    folder = write(tmp_path / "videos", a_mp4="", a_txt="x", c__b_mp4="", c__b_txt="y")
    write(tmp_path / "others", d_mp4="", d_txt="z")
    for place in ("c/e", "d", ".hidden"):
        (folder / place).symlink_to(tmp_path / "others")
    captions = open_captions(folder, skip_bad=True)
    assert [caption.video for caption in captions] == ["a.mp4", "c/b.mp4"]
    assert [record.place for record in captions.bad] == ["c/e", "d"]
    assert all("is a link to a folder, which is not followed" in record.reason for record in captions.bad)
    assert [caption.text for caption in captions.select([1, 0])] == ["y", "x"]
    with pytest.raises(ValueError, match=r"videos c/e: is a link to a folder"):
        open_captions(folder)


def test_names_as_cameras_and_macs_write_them(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    names = {"CLIP.MP4": "CLIP.TXT", "b.mov": "b.Json", f"{decomposed}.mp4": f"{composed}.txt", "x.y.mp4": "x.y.txt"}
    for video, text in names.items():
        (tmp_path / video).touch()
        (tmp_path / text).write_text(f'["{video}"]' if text.endswith("Json") else video)
    (tmp_path / "x.txt").write_text("of another video")
    (tmp_path / "._b.mov").write_bytes(b"\0\5\x16\7")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    captions = open_captions(tmp_path)
    assert {caption.video: caption.text for caption in captions} == {
        video: unicodedata.normalize("NFC", video) for video in names
    }


def test_of_two_texts_that_differ_in_case_the_lower_case_one(tmp_path):
    write(tmp_path, a_mp4="", a_TXT="upper", a_txt="lower")
    assert next(iter(open_captions(tmp_path))).text == "lower"
