"""The checkpoint folder: round trips, shards, frozen trunks, and one line for every kind of damage."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cogvideo.checkpoint import load_checkpoint, save_checkpoint
from cogvideo.checkpoint.format import write_checkpoint
from cogvideo.files import sha256_file
from cogvideo.tensor_file import TensorInfo
from tests.helpers.data import make_prepared


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(7, 5, generator=generator),
        "a.half": torch.randn(3, 3, generator=generator).half(),
        "a.brain": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor(12, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
    }


def seal(directory: Path) -> None:
    """Make the manifest agree with the folder's files, for tests of checks other than the hashes."""
    names = [path.name for path in directory.iterdir() if path.name not in ("manifest.json", "README.md")]
    files = {
        name: {"sha256": sha256_file(directory / name), "size": (directory / name).stat().st_size} for name in names
    }
    (directory / "manifest.json").write_text(json.dumps({"files": files}))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    seal(path.parent)


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 100, 1])
def test_round_trip(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = some_tensors()
    config = {"model": {"num_layers": 3, "名": "字"}}
    save_checkpoint(tmp_path / "c", tensors, config, extra={"step": 5}, max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.config == config
    assert loaded.extra == {"step": 5}
    assert set(loaded.names) == set(tensors)
    for name, tensor in loaded.tensors().items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name]), name
        assert loaded.infos[name] == TensorInfo.of(tensor)
    assert (tmp_path / "c" / "model.safetensors.index.json").exists() == (max_shard_bytes < 1000)


def test_our_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_checkpoint(tmp_path / "c", some_tensors(), {})
    read = load_file(tmp_path / "c" / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in some_tensors().items())


def test_non_contiguous_tensors_are_written_by_value(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(tmp_path / "c", {"t": matrix.T, "s": matrix[:, 1]}, {})
    loaded = load_checkpoint(tmp_path / "c")
    assert torch.equal(loaded.tensor("t"), matrix.T)
    assert torch.equal(loaded.tensor("s"), matrix[:, 1])


def test_a_checkpoint_is_replaced_but_nothing_else_is(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {"x": torch.zeros(2)}, {})
    save_checkpoint(tmp_path / "c", {"x": torch.ones(2)}, {})
    assert torch.equal(load_checkpoint(tmp_path / "c").tensor("x"), torch.ones(2))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path / "home", {"x": torch.ones(2)}, {})
    assert (tmp_path / "home" / "letter.txt").exists()


def test_prepared_data_is_not_replaced_by_a_checkpoint(tmp_path: Path) -> None:
    data = make_prepared(tmp_path / "data")
    with pytest.raises(FileExistsError, match="data exists; choose another name"):
        save_checkpoint(data, {"x": torch.ones(2)}, {})
    assert (data / "rows.npy").exists()


def test_a_checkpoint_beside_other_files_is_not_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"x": torch.zeros(2)}, {})
    for name in (".DS_Store", "README.md"):
        (tmp_path / name).touch()
    save_checkpoint(tmp_path, {"x": torch.ones(2)}, {})
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds notes\.txt beside a checkpoint"):
        save_checkpoint(tmp_path, {"x": torch.zeros(2)}, {})
    assert torch.equal(load_checkpoint(tmp_path).tensor("x"), torch.ones(2)) and (tmp_path / "notes.txt").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {"x": torch.zeros(2)}, {})

    def fail(name: str) -> torch.Tensor:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path / "c", {"x": TensorInfo(torch.float32, (2,))}, fail, {})
    assert torch.equal(load_checkpoint(tmp_path / "c").tensor("x"), torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def stage_on_trunk(folder: Path) -> Path:
    save_checkpoint(folder / "trunk", {"shared": torch.arange(4.0)}, {"task": "image"})
    save_checkpoint(folder / "stage", {"own": torch.ones(2)}, {"task": "sequential"}, trunk=folder / "trunk")
    return folder / "stage"


def test_a_stage_is_merged_with_its_trunk(tmp_path: Path) -> None:
    stage = stage_on_trunk(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    loaded = load_checkpoint(tmp_path / "elsewhere" / stage.name)
    assert set(loaded.names) == {"shared", "own"}
    assert torch.equal(loaded.tensor("shared"), torch.arange(4.0))
    assert loaded.config == {"task": "sequential"}


def test_a_changed_trunk_is_refused(tmp_path: Path) -> None:
    stage = stage_on_trunk(tmp_path)
    save_checkpoint(tmp_path / "trunk", {"shared": torch.zeros(4)}, {"task": "image"})
    with pytest.raises(ValueError, match="not the one"):
        load_checkpoint(stage)
    shutil.rmtree(tmp_path / "trunk")
    with pytest.raises(FileNotFoundError, match="needs its trunk"):
        load_checkpoint(stage)


def test_a_trunk_outside_the_parent_folder_is_refused(tmp_path: Path) -> None:
    stage = stage_on_trunk(tmp_path / "in")
    with pytest.raises(ValueError, match="must be in the same folder"):
        save_checkpoint(tmp_path / "out" / "stage", {"own": torch.ones(1)}, {}, trunk=tmp_path / "in" / "trunk")
    shutil.copytree(tmp_path / "in" / "trunk", tmp_path / "out" / "trunk")
    sha256 = sha256_file(tmp_path / "out" / "trunk" / "manifest.json")
    for path in ["../../out/trunk", str(tmp_path / "out" / "trunk"), "..", ".", "", "a\0b", "x" * 5000]:
        edit(stage / "config.json", trunk={"path": path, "sha256": sha256})
        with pytest.raises(ValueError, match="not beside it"):
            load_checkpoint(stage)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out" / "trunk")
    edit(stage / "config.json", trunk={"path": "../link", "sha256": sha256})
    with pytest.raises(ValueError, match="not beside it"):
        load_checkpoint(stage)


def test_trunks_do_not_chain_or_overlap(tmp_path: Path) -> None:
    stage = stage_on_trunk(tmp_path)
    save_checkpoint(tmp_path / "third", {"more": torch.ones(1)}, {}, trunk=stage)
    with pytest.raises(ValueError, match="a trunk must be complete"):
        load_checkpoint(tmp_path / "third")
    save_checkpoint(tmp_path / "fourth", {"shared": torch.ones(1)}, {}, trunk=tmp_path / "trunk")
    with pytest.raises(ValueError, match="shared"):
        load_checkpoint(tmp_path / "fourth")


def test_folders_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("7")
    with pytest.raises(FileNotFoundError, match="cogvideo convert"):
        load_checkpoint(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "c", {f"t{i}": torch.full((8,), float(i)) for i in range(4)}, {}, max_shard_bytes=64)
    return tmp_path / "c"


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load_checkpoint(sharded)


def test_shards_and_index_must_agree(sharded: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for change, wrong in [
        ({"t9": first}, "t9"),
        ({"t0": second}, "t0"),
        ({"t0": "../c/" + first}, "not a shard of this folder"),
        ({"t0": "/etc/passwd"}, "not a shard of this folder"),
        ({"t0": "config.json"}, "not a shard of this folder"),
        ({"t0": 5}, "weight_map"),
    ]:
        edit(index, weight_map=good | change)
        with pytest.raises(ValueError, match=wrong):
            load_checkpoint(sharded)
    del good["t1"]
    edit(index, weight_map=good)
    with pytest.raises(ValueError, match="t1"):
        load_checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    shutil.copy(first, second)
    weight_map = {"t0": first.name, "t1": first.name}
    index = sharded / "model.safetensors.index.json"
    # JSON with a repeated key, which a plain reader would not notice
    text = json.dumps({"weight_map": weight_map})
    index.write_text(text.replace('"t0"', f'"t0": "{second.name}", "t1": "{second.name}", "t0"', 1))
    seal(sharded)
    with pytest.raises(ValueError, match="occurs twice"):
        load_checkpoint(sharded)


def test_a_newer_format_is_refused(sharded: Path) -> None:
    edit(sharded / "config.json", format=2)
    with pytest.raises(ValueError, match="update"):
        load_checkpoint(sharded)


def test_unknown_tensor_is_named(sharded: Path) -> None:
    with pytest.raises(ValueError, match="no tensor absent"):
        load_checkpoint(sharded).tensor("absent")
