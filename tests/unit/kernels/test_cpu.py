"""The compiled CPU kernels: products of a few rows, and how the library is found, compiled and refused."""

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cogvideo.dtypes import WeightName
from cogvideo.files import is_private
from cogvideo.kernels import cpu
from cogvideo.model.quantize import Linear, convert_weights

needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler here")


@needs_kernels
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 32])
def test_a_product_is_that_of_the_stored_weights(dtype: WeightName, rows: int) -> None:
    torch.manual_seed(0)
    linear = Linear(37, 21).requires_grad_(False)
    convert_weights(linear, dtype)
    stored = linear.weight.double()
    if linear.weight_scale is not None:
        stored = stored * linear.weight_scale[:, None].double()
    x = torch.randn(rows, 37)
    expected = F.linear(x.double(), stored, linear.bias.double())
    y = cpu.linear(x, linear.weight, linear.bias, linear.weight_scale)
    assert y is not None
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@needs_kernels
def test_a_row_does_not_depend_on_the_others() -> None:
    weight, bias, x = torch.randn(21, 37), torch.randn(21), torch.randn(9, 37)
    together = cpu.linear(x, weight, bias, None)
    assert together is not None
    for i in range(9):
        alone = cpu.linear(x[i : i + 1], weight, bias, None)
        assert alone is not None and torch.equal(alone[0], together[i])


def test_unsupported_products_are_left_to_pytorch() -> None:
    weight, x = torch.randn(21, 37), torch.randn(2, 37)
    assert cpu.linear(torch.randn(cpu.MAX_ROWS + 1, 37), weight, None, None) is None
    assert cpu.linear(x.double(), weight, None, None) is None
    assert cpu.linear(x, weight.double(), None, None) is None
    assert cpu.linear(x.to("meta"), weight.to("meta"), None, None) is None


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Look for the library again, in the test and after it."""
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@needs_kernels
def test_structures_of_another_size_are_refused_in_one_line(
    fresh_library: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernels would read beyond what Python passes."""

    class Larger(ctypes.Structure):
        _fields_ = (*cpu.KVBuffer._fields_, ("another", ctypes.c_long))

    monkeypatch.setattr(cpu, "STRUCTURES", (*cpu.STRUCTURES[:6], Larger, *cpu.STRUCTURES[7:]))
    monkeypatch.setattr(cpu.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger=cpu.log.name):
        assert cpu.library() is None
    assert "CPU kernels are not used: structure sizes are" in log_of(caplog)
    assert len(caplog.records) == 1


@needs_kernels
def test_a_structure_that_only_one_side_has_is_refused(fresh_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    structures = cpu.STRUCTURES
    for changed in (structures[:-1], (*structures, cpu.Norm)):
        monkeypatch.setattr(cpu, "STRUCTURES", changed)
        cpu.library.cache_clear()
        assert cpu.library() is None
    monkeypatch.setattr(cpu, "STRUCTURES", structures)
    cpu.library.cache_clear()
    assert cpu.library() is not None


def test_without_a_compiler_there_is_no_library(
    fresh_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger=cpu.log.name):
        assert cpu.library() is None
    assert "CPU kernels are not available" in log_of(caplog)
    assert cpu.linear(torch.randn(2, 37), torch.randn(21, 37), None, None) is None


@needs_kernels
def test_code_that_another_user_could_have_written_is_not_loaded(
    fresh_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu.library() is not None
    (compiled,) = (tmp_path / "cogvideo").iterdir()
    assert is_private(compiled) and is_private(compiled.parent)
    compiled.unlink()  # not to be changed while it is loaded
    compiled.write_bytes(b"code of another user")
    compiled.chmod(0o666)
    compiled.parent.chmod(0o777)
    cpu.library.cache_clear()
    assert cpu.library() is not None, "compiled again"
    assert is_private(compiled) and is_private(compiled.parent) and compiled.read_bytes()[:4] == b"\x7fELF"


def test_a_cache_folder_that_others_can_replace_is_not_used(
    fresh_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(cpu.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger=cpu.log.name):
        assert cpu.library() is None
    assert f"everybody can write to {tmp_path}; set XDG_CACHE_HOME" in log_of(caplog)
