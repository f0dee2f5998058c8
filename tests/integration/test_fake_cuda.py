"""Training steps and sampling on fake tensors of a GPU: no operation mixes devices, no host sync where none belongs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_cuda import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.has_cuda_build(), reason="this PyTorch has CUDA, which the fake device cannot replace"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device needs g++"),
]


def test_training_and_sampling_run_on_a_gpu_without_mixing_devices(tmp_path: Path) -> None:
    """In a process of its own, since the device must be loaded before PyTorch."""
    library = tmp_path / "device.so"
    build.build(library)
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.fake_cuda.checks", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert result.returncode == 0, result.stderr
    problems = json.loads(result.stdout)
    assert len(problems) > 30
    assert {name: problem for name, problem in problems.items() if problem} == {}
