"""Damaged folders and files of every kind are read, or refused in one line that names the file; short fuzzing."""

from pathlib import Path

import pytest
import torch.distributed as dist

from cogvideo.training.launch import prepare_environment
from tests.helpers.damage import Kind, fuzz, kind_of, kinds
from tests.helpers.readers import readers

KINDS = ("bundle", "checkpoint", "clips", "frames", "run", "samples")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare_environment()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def all_kinds(scratch: Path) -> dict[str, Kind]:
    (scratch / "sound").mkdir()
    return kinds(scratch / "sound")


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_read_or_refused_in_one_line(name: str, all_kinds: dict[str, Kind], scratch: Path) -> None:
    folder = scratch / name
    folder.mkdir()
    outcomes, faults = fuzz(all_kinds[name], 40, 0, folder)
    assert not faults
    assert outcomes.keys() <= {"read", "refused"} and outcomes["refused"] > 5


def test_single_files_are_read_or_refused_in_one_line(all_kinds: dict[str, Kind], tmp_path: Path) -> None:
    found = readers(tmp_path)
    assert all_kinds.keys() == {*KINDS, *found}
    for name, reader in found.items():
        (tmp_path / name).mkdir()
        outcomes, faults = fuzz(kind_of(reader), 12, 0, tmp_path / name)
        assert not faults and outcomes.keys() <= {"read", "refused"}, name
