"""A folder being filled: what is kept, what is gone on with, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch

from cogvideo.distributed import ProcessGroup
from cogvideo.sampling.work import UNFINISHED, Work

IDENTITY = {"weights": "abc", "clips": [["a", 0]], "settings": {"seed": 7, "key_frames": {"temperature": 1.0}}}


def work(out: Path, processes: ProcessGroup | None = None, **changed: object) -> Work:
    return Work(out, {**IDENTITY, **changed}, processes or ProcessGroup())


def never() -> torch.Tensor:
    raise AssertionError("it was kept")


def test_batches_are_kept_until_their_group_is_done(tmp_path: Path) -> None:
    first = work(tmp_path / "out")
    assert first.begin()
    keep = first.keep(0)
    tokens = torch.arange(6).view(1, 2, 3)
    assert torch.equal(keep("round-1-000000", lambda: tokens), tokens)
    again = work(tmp_path / "out")
    assert again.begin(resume=True) and torch.equal(again.keep(0)("round-1-000000", never), tokens)
    assert not again.is_done(0)
    again.finish(1, [1], tokens + 1)
    again.finish(0, [0], tokens)
    assert again.is_done(0)
    assert sorted(os.listdir(again.folder)) == ["000000.safetensors", "000001.safetensors", "work.json"]
    assert torch.equal(again.gather(2), torch.cat([tokens, tokens + 1])), "in the order of the clips"
    with pytest.raises(ValueError, match="does not hold every clip once"):
        again.gather(3)
    again.end()
    assert os.listdir(tmp_path / "out") == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    first = work(tmp_path)
    first.begin()
    for left in (tmp_path / ".a.abcd1234.tmp.mp4", first.folder / ".000000-x.abcd_234.tmp.safetensors"):
        left.write_text("half")
    assert work(tmp_path).begin(resume=True)
    assert os.listdir(tmp_path) == [UNFINISHED] and os.listdir(first.folder) == ["work.json"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weights": "other"}, "was begun with other weights; give the same"),
        ({"given frames": None}, "was begun by another command; give the same"),
        ({"clips": [["b", 0]]}, "was begun with other clips; give the same"),
        ({"settings": {"seed": 8, "key_frames": {"temperature": 1.0}}}, "other settings: seed=7, not 8"),
        ({"settings": {"seed": 7, "key_frames": {"temperature": 2.0}}}, "key_frames: temperature=1.0, not 2.0"),
        ({"processes": ProcessGroup(0, 1)}, None),
    ],
)
def test_going_on_with_something_else(tmp_path: Path, changed: dict, said: str | None) -> None:
    work(tmp_path).begin()
    before = sorted(tmp_path.rglob("*"))
    if said is None:
        assert work(tmp_path, **changed).begin(resume=True)
        return
    with pytest.raises(ValueError, match=said):
        work(tmp_path, **changed).begin(resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_going_on_with_another_number_of_processes(tmp_path: Path) -> None:
    work(tmp_path).begin()
    record = tmp_path / UNFINISHED / "work.json"
    record.write_text(record.read_text().replace('"processes": 1', '"processes": 3'))
    with pytest.raises(ValueError, match="was begun by 3 processes, not 1"):
        work(tmp_path).begin(resume=True)


def test_folders(tmp_path: Path) -> None:
    assert work(tmp_path / "new").begin(resume=True), "nothing to go on with yet: it begins"
    (tmp_path / "half" / UNFINISHED).mkdir(parents=True)
    assert work(tmp_path / "half").begin(resume=True), "killed before it had begun"
    with pytest.raises(FileExistsError, match="holds an unfinished run; --resume goes on, --overwrite begins anew"):
        work(tmp_path / "new").begin()
    work(tmp_path / "new").keep(0)("x", lambda: torch.zeros(1))
    assert work(tmp_path / "new", weights="other").begin(overwrite=True)
    assert os.listdir(tmp_path / "new" / UNFINISHED) == ["work.json"]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds no run to go on with"):
        work(tmp_path / "foreign").begin(resume=True)


def test_a_finished_folder_is_known_again(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps({"made_from": work(tmp_path).digest}))
    assert not work(tmp_path).begin(resume=True)
    with pytest.raises(ValueError, match="holds other finished clips"):
        work(tmp_path, weights="other").begin(resume=True)


@pytest.mark.parametrize("text", ["", "[1]", '{"work": 3}'])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    work(tmp_path).begin()
    (tmp_path / UNFINISHED / "work.json").write_text(text)
    with pytest.raises(ValueError, match=r"work\.json"):
        work(tmp_path).begin(resume=True)


def test_a_damaged_batch(tmp_path: Path) -> None:
    started = work(tmp_path)
    started.begin()
    started.keep(0)("x", lambda: torch.zeros(1))
    path = started.folder / "000000-x.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"000000-x\.safetensors is damaged .*; remove it to draw it again"):
        started.keep(0)("x", never)
