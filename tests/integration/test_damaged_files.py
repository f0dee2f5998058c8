"""Damaged folders of every kind are read, or refused in one line that names the file: a short form of the fuzzing."""

from pathlib import Path

import pytest
import torch.distributed as dist

from cogvideo.training.launch import prepare_environment
from tests.helpers.damage import fuzz, kinds

KINDS = ("bundle", "checkpoint", "clips", "frames", "run", "samples")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare_environment()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_read_or_refused_in_one_line(name: str, scratch: Path) -> None:
    folder = scratch / name
    folder.mkdir()
    kind = kinds(folder)
    assert kind.keys() == set(KINDS)
    outcomes, faults = fuzz(kind[name], 40, 0, folder)
    assert not faults
    assert outcomes.keys() <= {"read", "refused"} and outcomes["refused"] > 5
