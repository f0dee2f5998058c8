"""scripts/device_timing.py: the device of `--device` suits torch's functions for GPUs."""

import argparse

import pytest
import torch

from tests.helpers.scripts import load_script

device_timing = load_script("device_timing")


def device_of(*words: str) -> torch.device:
    parser = argparse.ArgumentParser()
    device_timing.add_device_argument(parser)
    return device_timing.device_argument(parser, parser.parse_args(words))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Two GPUs, as far as torch's own Python functions can tell; lists what reaches the driver."""
    found: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    for name in ("_cuda_setDevice", "_cuda_setMemoryFraction", "_cuda_resetPeakMemoryStats"):
        monkeypatch.setattr(torch._C, name, lambda *given: found.append(given), raising=False)
    return found


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_an_index_and_is_the_current_device(name: str, index: int, calls: list[tuple[object, ...]]) -> None:
    device = device_of("--device", name)
    assert device == torch.device("cuda", index)
    torch.cuda.set_per_process_memory_fraction(0.5, device)  # refuses a device without an index
    assert calls == [(index,), (0.5, index)]


def test_a_cpu_stays_as_it_is(calls: list[tuple[object, ...]]) -> None:
    assert device_of() == torch.device("cpu") and not calls


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "meta"])
def test_a_wrong_device_is_one_line(
    name: str, calls: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        device_of("--device", name)
    assert caught.value.code == 2 and f"--device={name}" in capsys.readouterr().err.splitlines()[-1]
    assert not calls


def test_the_peak_of_a_gpu_is_reset_and_a_cpu_has_none(calls: list[tuple[object, ...]]) -> None:
    device_timing.reset_peak(torch.device("cpu"))
    assert not calls and device_timing.peak_gb(torch.device("cpu")) is None
    device_timing.reset_peak(torch.device("cuda", 1))
    assert calls == [(1,)]
