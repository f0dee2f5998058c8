"""Choosing a reader by the path, and what all formats share: bad records, positions, files that are refused."""

import json

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers import ReadOptions, open_captions

TABLE = "video,caption\na.mp4,a dog\n../b.mp4,out\nc.mp4,\nd.mp4,a boat\n"


def test_bad_records_are_errors_or_skipped_and_listed(tmp_path):
    (tmp_path / "c.csv").write_text(TABLE)
    with pytest.raises(ValueError, match=r"c\.csv line 3: .*lies outside"):
        open_captions(tmp_path / "c.csv")
    captions = open_captions(tmp_path / "c.csv", skip_bad=True)
    assert [caption.text for caption in captions] == ["a dog", "a boat"]
    first, second = captions.bad_reasons()
    assert first.startswith("c.csv line 3: video='../b.mp4' lies outside")
    assert second == "c.csv line 4: the caption is empty; describe the video in a few words"


def test_without_a_good_record_the_first_reason_is_the_error(tmp_path):
    (tmp_path / "c.csv").write_text("video,caption\na.mp4,\nb.mp4,\n")
    with pytest.raises(ValueError, match=r"line 2: the caption is empty; .* \(and 1 more; no caption is left\)"):
        open_captions(tmp_path / "c.csv", skip_bad=True)


def test_absolute_paths_inside_the_folder_become_relative(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"video": f"{tmp_path}/v/a.mp4", "caption": "x"}) + "\n")
    assert open_captions(tmp_path / "c.jsonl").select([0])[0].video == "v/a.mp4"
    assert open_captions(tmp_path / "c.jsonl", videos=tmp_path / "v").select([0])[0].video == "a.mp4"
    with pytest.raises(ValueError, match="lies outside"):
        open_captions(tmp_path / "c.jsonl", videos=tmp_path / "w")


def test_absolute_paths_through_links_become_relative(tmp_path):
    """As where /data is a link to another disk, and the captions name either."""
    (tmp_path / "disk/v/w").mkdir(parents=True)
    (tmp_path / "data").symlink_to("disk")
    (tmp_path / "disk/v/up").symlink_to("..")
    (tmp_path / "disk/v/loop").symlink_to("loop")
    names = ["data/v/a.mp4", "disk/v/w/b.mp4", "data/v/w/../d.mp4"]
    outside = [
        "data/a.mp4",
        "disk/v/../b.mp4",
        "data/v/up/../a.mp4",
        "disk/v/w/..",
        "e/f.mp4",
        "data/v/loop/../../a.mp4",
    ]
    file = tmp_path / "c.jsonl"
    file.write_text(
        "".join(json.dumps({"video": f"{tmp_path}/{name}", "caption": "x"}) + "\n" for name in names + outside)
    )
    for folder in (tmp_path / "data/v", tmp_path / "disk/v"):
        captions = open_captions(file, videos=folder, skip_bad=True)
        assert [caption.video for caption in captions] == ["a.mp4", "w/b.mp4", "d.mp4"]
        assert len(captions.bad) == len(outside)
        assert all("lies outside the folder of videos" in record.reason for record in captions.bad)


@pytest.mark.parametrize(
    ("name", "text"), [("csv", "file_name,text\na.mp4,x\n"), ("jsonl", '{"file_name": "a.mp4", "text": "x"}\n')]
)
def test_a_video_folder_with_metadata(tmp_path, name, text):
    (tmp_path / f"metadata.{name}").write_text(text)
    (tmp_path / "a.txt").write_text("not this one")
    captions = open_captions(tmp_path)
    assert list(captions) == [Caption("a.mp4", "x")] and captions.folder == tmp_path
    (tmp_path / "metadata.parquet").touch()
    with pytest.raises(ValueError, match=r"and metadata\.parquet; name the one to use with --captions"):
        open_captions(tmp_path)


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl", "c.json"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="holds no captions"):
        open_captions(tmp_path / name)


def test_unknown_suffixes_and_missing_files(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a captions file in \.csv, .*\.parquet, a \.tar or a folder, got '\.xls'"
    ):
        open_captions(tmp_path / "c.xls")
    for name in ("none.jsonl", "none.csv", "none.json", "none.tar"):
        with pytest.raises(FileNotFoundError):
            open_captions(tmp_path / name)


def test_suffixes_in_capitals(tmp_path):
    (tmp_path / "C.CSV").write_text("video,caption\na.mp4,x\n")
    assert list(open_captions(tmp_path / "C.CSV", ReadOptions())) == [Caption("a.mp4", "x")]
