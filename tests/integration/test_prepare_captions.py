"""`cogvideo prepare` with every format of captions gives the same rows; skipped records; held-out videos."""

import csv
import json
import shutil
import tarfile

import numpy as np
import pytest

from cogvideo.cli.main import main
from cogvideo.data.dataset import FrameDataset
from cogvideo.media.video import write_video

CAPTIONS = {"a.mp4": 'a disc, called "moon", moves', "b.mp4": "two circles", "c.mp4": "红色的数字"}
FRAMES = ["--frames", "frame_pixels=16", "frames_per_video=2"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index, name in enumerate(CAPTIONS):
        frames = np.full((5, 16, 24, 3), 60 * index, np.uint8)
        frames[:, :8] += np.arange(5, dtype=np.uint8)[:, None, None, None] * 10
        write_video(folder / name, frames, 8)
    return folder


def prepare(captions, out, *words):
    return main(["prepare", "--captions", str(captions), "--out", str(out), *FRAMES, *map(str, words)])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_csv(folder, delimiter=","):
    path = folder / ("c.csv" if delimiter == "," else "c.tsv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("file_name", "text"), *CAPTIONS.items()])
    return path


def write_jsonl(folder):
    rows = [json.dumps({"path": name, "title": text}) + "\n" for name, text in CAPTIONS.items()]
    (folder / "c.jsonl").write_text("".join(rows))
    return folder / "c.jsonl"


def write_json(folder):
    (folder / "c.json").write_text(json.dumps(CAPTIONS))
    return folder / "c.json"


def write_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    table = pyarrow.table({"clip": list(CAPTIONS), "prompt": list(CAPTIONS.values())})
    pytest.importorskip("pyarrow.parquet").write_table(table, folder / "c.parquet")
    return folder / "c.parquet"


@pytest.mark.parametrize(
    "write", [write_csv, lambda folder: write_csv(folder, "\t"), write_jsonl, write_json, write_parquet]
)
def test_every_file_gives_the_same_folder(videos, tmp_path, write):
    (tmp_path / "c").mkdir()
    assert prepare(write(tmp_path / "c"), tmp_path / "out", "--videos", videos) == 0
    found = [(line["video"], line["text"]) for line in lines(tmp_path / "out" / "captions.jsonl")]
    assert found == list(CAPTIONS.items())
    assert len(FrameDataset(tmp_path / "out")) == 6


def test_folders_of_texts_and_tars_give_the_same_frames(videos, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    with tarfile.open(tmp_path / "s-00.tar", "w") as tar:
        for name, text in CAPTIONS.items():
            (folder / name).write_bytes((videos / name).read_bytes())
            (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")
            tar.add(folder / name, name)
            tar.add((folder / name).with_suffix(".txt"), name.replace(".mp4", ".txt"))
    assert prepare(write_jsonl(tmp_path), tmp_path / "out", "--videos", videos) == 0
    assert prepare(folder, tmp_path / "out_folder") == 0
    before = {path.name for path in tmp_path.iterdir()}
    assert prepare(tmp_path / "s-{00..00}.tar", tmp_path / "out_tar") == 0
    assert {path.name for path in tmp_path.iterdir()} == before | {"out_tar"}, "nothing is extracted"
    expected = FrameDataset(tmp_path / "out").frames(range(6))
    for out in ("out_folder", "out_tar"):
        assert (FrameDataset(tmp_path / out).frames(range(6)) == expected).all()
    assert [line["video"] for line in lines(tmp_path / "out_tar" / "captions.jsonl")] == [
        f"s-00.tar/{n}" for n in CAPTIONS
    ]


def test_bad_records_are_listed_with_file_and_line(videos, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("video,caption,views\na.mp4,x,3\nb.mp4,\n../c.mp4,y,1\nnone.mp4,z,\nb.mp4,w,\n")
    assert prepare(tmp_path / "c.csv", tmp_path / "out", "--videos", videos, "--dry-run") == 0
    assert "5 captions of 3 videos; 3 captions would be skipped" in capsys.readouterr().out
    assert prepare(tmp_path / "c.csv", tmp_path / "out", "--videos", videos) == 0
    kept = lines(tmp_path / "out" / "captions.jsonl")
    assert [(line["text"], line["extra"]) for line in kept] == [
        ("x", {"views": "3"}),
        ("z", {"views": ""}),
        ("w", {"views": ""}),
    ]
    reasons = [entry["reason"] for entry in lines(tmp_path / "out" / "skipped.jsonl")]
    assert reasons[0].startswith("c.csv line 3: expected 3 fields") and reasons[1].startswith(
        "c.csv line 4: video='../c"
    )
    assert reasons[2].startswith("none.mp4 ") and len(reasons) == 3
    assert "3 of 5 captions skipped" in capsys.readouterr().err
    assert prepare(tmp_path / "c.csv", tmp_path / "strict", "--videos", videos, "strict=true") == 2
    assert "c.csv line 3" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "strict").exists()


def test_videos_are_held_out_whole(videos, tmp_path, capsys):
    captions = tmp_path / "c.jsonl"
    records = [{"video": name, "caption": f"{text} {again}"} for again in range(2) for name, text in CAPTIONS.items()]
    captions.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--videos", videos, "--validation", "0.3"]
    assert prepare(captions, tmp_path / "out", *words, "--dry-run") == 0
    assert f"{tmp_path / 'out' / 'validation'}:\n2 captions of 1 videos" in capsys.readouterr().out
    assert prepare(captions, tmp_path / "out", *words) == 0
    parts = [lines(folder / "captions.jsonl") for folder in (tmp_path / "out", tmp_path / "out" / "validation")]
    training, held_out = ({line["video"] for line in part} for part in parts)
    assert (len(training), len(held_out)) == (2, 1) and not training & held_out
    assert [len(FrameDataset(tmp_path / "out" / part)) for part in ("", "validation")] == [8, 4]
    assert prepare(captions, tmp_path / "out", *words) == 0, "it resumes"
    assert prepare(captions, tmp_path / "out", "--videos", videos) == 2
    assert "begun with other captions" in capsys.readouterr().err
    captions.write_text("".join(json.dumps(record) + "\n" for record in reversed(records)))
    assert prepare(captions, tmp_path / "again", *words) == 0
    assert {line["video"] for line in lines(tmp_path / "again" / "validation" / "captions.jsonl")} == held_out


def held_out_of(out):
    return [{line["video"] for line in lines(out / part / "captions.jsonl")} for part in ("validation", "")]


@pytest.fixture
def eight(videos, tmp_path):
    """Eight videos and their captions; and those held out, of which a quarter is wanted."""
    folder = tmp_path / "eight"
    folder.mkdir()
    names = [f"{number}.mp4" for number in range(8)]
    for name in names:
        (folder / name).write_bytes((videos / "a.mp4").read_bytes())
    (folder / "c.jsonl").write_text("".join(json.dumps({"video": name, "caption": "x"}) + "\n" for name in names))
    assert prepare(folder / "c.jsonl", tmp_path / "sound", "--validation", "0.25") == 0
    assert "validation" not in json.loads((tmp_path / "sound/plan.json").read_text())
    return folder, held_out_of(tmp_path / "sound")[0]


def test_videos_that_give_rows_are_held_out(eight, tmp_path, capsys):
    folder, first = eight
    good = {name: (folder / name).read_bytes() for name in first}
    for name in first:
        (folder / name).write_bytes(good[name][:100])
    out, words = tmp_path / "out", ["--validation", "0.25"]
    assert prepare(folder / "c.jsonl", out, *words, "--dry-run") == 0
    assert f"{out / 'validation'}:\n4 captions of 4 videos; 2 captions would be skipped" in capsys.readouterr().out
    assert prepare(folder / "c.jsonl", out, *words) == 0
    validation, training = held_out_of(out)
    assert first < validation and len(validation) == len(training) == 4 and not validation & training
    assert [len(FrameDataset(out / part)) for part in ("", "validation")] == [8, 4]
    assert json.loads((out / "plan.json").read_text())["validation"] == {"wanted": 2, "drawn": 4}
    shutil.rmtree(out / "validation")
    (out / "manifest.json").unlink()
    for name in first:  # repaired, but the run goes on with what it has drawn
        (folder / name).write_bytes(good[name])
    for more in ((), ("strict=true",)):
        assert prepare(folder / "c.jsonl", out, *words, *more) == 0
        assert held_out_of(out) == [validation, training]
    for fraction, what in (("0.5", "validation"), ("0.6", "captions")):
        assert prepare(folder / "c.jsonl", out, "--validation", fraction) == 2
        assert f"begun with other {what}" in capsys.readouterr().err


def test_a_folder_of_the_previous_version_keeps_its_held_out_videos(eight, tmp_path):
    folder, first = eight
    broken = min(first)
    (folder / broken).write_bytes(b"")
    (tmp_path / "sound/manifest.json").unlink()
    shutil.rmtree(tmp_path / "sound/validation")
    assert prepare(folder / "c.jsonl", tmp_path / "sound", "--validation", "0.25") == 0
    assert held_out_of(tmp_path / "sound")[0] == first and len(FrameDataset(tmp_path / "sound/validation")) == 2
    for name in first:
        (folder / name).write_bytes(b"")
    shutil.rmtree(tmp_path / "sound/validation")
    assert prepare(folder / "c.jsonl", tmp_path / "sound", "--validation", "0.25") == 2


@pytest.mark.parametrize("sound", [0, 1, 2, 3])
def test_a_video_is_left_on_either_side(eight, tmp_path, capsys, sound):
    folder, _ = eight
    for number in range(sound, 8):
        (folder / f"{number}.mp4").write_bytes(b"")
    assert prepare(folder / "c.jsonl", tmp_path / "out", "--validation", "0.75") == (0 if sound > 1 else 2)
    if sound > 1:
        rows = [len(FrameDataset(tmp_path / "out" / part)) for part in ("", "validation")]
        assert rows == [2, 2 * (sound - 1)]
    else:
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"--validation needs two videos that give rows, one to hold out and one to train on, but {sound}" in last
        assert ".mp4 is empty" in last and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        *((number, f"a fraction of {number} cannot be held out") for number in ("0", "1", "-0.5", "nan")),
        ("x", "--validation: invalid float value: 'x'"),
    ],
)
def test_a_fraction_that_is_none(videos, tmp_path, capsys, fraction, message):
    assert prepare(write_jsonl(tmp_path), tmp_path / "out", "--videos", videos, f"--validation={fraction}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vocabulary_reads_the_same_captions(tmp_path, capsys):
    from tests.helpers.bundles import write_bundle

    bundle = write_bundle(tmp_path / "bundle", 2, num_layers=1)
    (tmp_path / "c.csv").write_bytes("video;légende\r\na.mp4;un café\r\nb.mp4;\r\n".encode("cp1252"))
    words = ["--encoding", "cp1252", "--caption-column", "légende", "--tokenizer", str(bundle / "image_tokenizer")]
    assert main(["vocabulary", "--captions", str(tmp_path / "c.csv"), *words, "--out", str(tmp_path / "t.model")]) == 0
    out = capsys.readouterr()
    assert "trained on 1 captions" in out.out and "c.csv line 3: the caption is empty" in out.err
