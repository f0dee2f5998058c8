"""Throughput and MFU between log lines, and the warning if a CPU emulates a dtype."""

import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogvideo.model.config import ModelConfig
from cogvideo.planning.counts import attention_pairs, training_flops
from cogvideo.training import resources
from cogvideo.training.config import LoopConfig
from cogvideo.training.resources import Throughput, measure_peak_flops, warn_if_emulated

CPU = torch.device("cpu")


def test_throughput_is_measured_since_the_last_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = Throughput(CPU, world_size=2, peak_flops=1e9)
    for _ in range(4):
        meter.add(tokens=50, flops=5e8)
    now = 108.0
    found = meter.take(steps_left=30)
    assert found["tokens_per_second"] == 50 and found["seconds_per_step"] == 2 and found["minutes_left"] == 1
    assert found["mfu"] == 0.25  # of each process's own device
    now = 110.0
    meter.add(tokens=10, flops=0.0)
    found = meter.take(0)
    assert found["tokens_per_second"] == 10 and "mfu" not in found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """getrusage's includes that of the parent when it started this process."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1 << 40))
    assert 50 < resources.peak_memory_mib(CPU) < most + 50


@pytest.mark.parametrize("status", ["", "VmPeak:\t 9 kB\nVmRSS:\t 9 kB\n", None])
def test_peak_memory_where_the_system_does_not_say_it(
    status: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(resources, "PROCESS_STATUS", tmp_path / "status")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 << 10))
    assert resources.peak_memory_mib(CPU) == 3


def test_peak_flops_are_measured() -> None:
    peak = measure_peak_flops(CPU, torch.float32)
    assert peak is not None and 0 < peak < 1e14


@pytest.mark.parametrize("fast", [True, False])
def test_emulated_bf16_is_warned_about(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    warnings: list[str] = []
    monkeypatch.setattr(resources.log, "warning", lambda text, *rest: warnings.append(text % rest))
    warn_if_emulated(CPU, LoopConfig(dtype="bf16"))
    warn_if_emulated(CPU, LoopConfig(dtype="fp32"))
    assert len(warnings) == (0 if fast else 1)
    assert fast or "train.dtype=fp32" in warnings[0]


@pytest.mark.parametrize(("capability", "is_native"), [((7, 0), False), ((7, 5), False), ((8, 0), True)])
def test_a_gpu_before_ampere_emulates_bf16(
    capability: tuple[int, int], is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    warnings: list[str] = []
    monkeypatch.setattr(resources.log, "warning", lambda text, *rest: warnings.append(text % rest))
    gpu = torch.device("cuda")
    assert resources.has_native_matmul(gpu, torch.bfloat16) is is_native
    assert resources.has_native_matmul(gpu, torch.float16)
    warn_if_emulated(gpu, LoopConfig(dtype="bf16"))
    assert is_native == (not warnings)
    assert is_native or "this GPU has no bf16 instructions" in warnings[0]


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "warns"),
    [
        ("cuda", (9, 0), "bf16", False),
        ("cuda", (8, 9), "bf16", False),
        ("cuda", (8, 0), "bf16", True),
        ("cuda", (9, 0), "fp16", True),
        ("cpu", (9, 0), "fp32", True),
    ],
)
def test_float8_that_is_dequantized_is_warned_about(
    device: str, capability: tuple[int, int], dtype: Any, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    warnings: list[str] = []
    monkeypatch.setattr(resources.log, "warning", lambda text, *rest: warnings.append(text % rest))
    warn_if_emulated(torch.device(device), LoopConfig(dtype=dtype, weights="dtype"), "float8")
    assert len(warnings) == warns
    assert not warns or "set init.trunk_weights=int8" in warnings[0]


def test_planned_flops_match_torchs_count() -> None:
    """Between the FLOPs of weight products alone and all FLOPs: torch does not count every attention kernel."""
    from torch.utils.flop_counter import FlopCounterMode

    from cogvideo.model.transformer import CogVideoTransformer
    from cogvideo.sequence.batch import Batch
    from cogvideo.sequence.layout import Vocabulary

    vocabulary = Vocabulary(size=80, num_image_tokens=64, pad=70, newline=71, start_of_image=79)
    sizes = dict(num_layers=2, hidden_size=64, num_heads=2, text_len=8, frame_side=3, frame_position_start=8)
    config = ModelConfig(**sizes, num_positions=32, vocabulary=vocabulary, dropout=0.0, attention_dropout=0.0)
    for frozen in (False, True):
        model = CogVideoTransformer(config)
        if frozen:
            model.freeze_trunk()
        text = torch.zeros(1, 8, dtype=torch.long)
        batch = Batch(text, torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 5, 9, dtype=torch.long), torch.ones(1))
        with FlopCounterMode(display=False) as counter:
            model.token_losses(batch).mean().backward()
        total = sum(training_flops(config, frozen_trunk=frozen))
        attention = 3.5 * 4 * 64 * attention_pairs(config) * 2
        assert 0.85 * (total - attention) < counter.get_total_flops() < 1.1 * total
