"""A single process starts on a CPU without a launcher, even where DeepSpeed itself would wait forever."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cogvideo.cli.main import main
from cogvideo.training import launch

START = """
from cogvideo.training.launch import prepare_environment
prepare_environment()
import deepspeed, torch
deepspeed.init_distributed("gloo", verbose=False)
total = torch.ones(1)
deepspeed.comm.all_reduce(total)
deepspeed.comm.inference_all_reduce(total)
print("world", deepspeed.comm.get_world_size(), "sum", total.item())
"""


@pytest.mark.slow
def test_one_process_starts_without_launcher_compiler_or_stale_lock(tmp_path: Path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    unwanted = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "world 1 sum 1.0" in done.stdout
    assert [p.name for p in tmp_path.rglob("*")] == ["deepspeed_shm_comm", "lock"], "something was built"


@pytest.mark.parametrize(
    ("gpus", "variables", "device", "local_rank"),
    [
        (0, {"WORLD_SIZE": "2"}, "cpu", "0"),
        (0, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cpu", "1"),
        (1, {"WORLD_SIZE": "2"}, "cuda:0", "0"),
        (1, {"WORLD_SIZE": "8", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}, "cuda:0", "0"),
        (4, {"WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, "cuda:3", "3"),
        (4, {"WORLD_SIZE": "1"}, "cuda:0", "0"),
        (4, {"WORLD_SIZE": "2"}, "LOCAL_RANK is not set, and each process sees 4 GPUs; start with", ""),
        (4, {"WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, "8 processes on this machine, but 4", ""),
        (4, {"WORLD_SIZE": "8", "LOCAL_RANK": "6"}, "7 processes on this machine, but 4 GPUs; start one", ""),
        (0, {"WORLD_SIZE": "2", "LOCAL_RANK": "one"}, "LOCAL_RANK=one LOCAL_WORLD_SIZE=1; expected numbers", ""),
    ],
)
def test_model_and_deepspeed_use_the_same_device(
    monkeypatch: pytest.MonkeyPatch, gpus: int, variables: dict[str, str], device: str, local_rank: str
) -> None:
    """DeepSpeed takes LOCAL_RANK for the device's index, and looks for MPI where it is missing."""
    from cogvideo.training.launch import own_device

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "")  # what the test sets is removed at its end
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not local_rank:
        with pytest.raises(ValueError, match=device):
            own_device()
        return
    assert str(own_device()) == device and os.environ["LOCAL_RANK"] == local_rank


def test_a_launchers_process_group_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvideo.training.launch import ONE_PROCESS, prepare_environment

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # only the environment is tested here
    for key in ONE_PROCESS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    prepare_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "8")
    assert "MASTER_PORT" not in os.environ


ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("name", [None, *ALLOCATORS])
def test_the_train_command_sets_up_cudas_allocator_unless_the_user_did(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = dict[str, str]()

    def train(config: Any, *, resume: bool) -> None:
        seen.update({key: os.environ[key] for key in ALLOCATORS if key in os.environ})
        (config.run_dir / "export").mkdir(parents=True)

    monkeypatch.setattr(launch, "train", train)
    users = {} if name is None else {name: "max_split_size_mb:64"}
    others = {key: value for key, value in os.environ.items() if key not in ALLOCATORS}
    with mock.patch.dict(os.environ, others | users, clear=True):
        assert main(["train", f"run_dir={tmp_path / 'run'}"]) == 0
    assert seen == (users or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
