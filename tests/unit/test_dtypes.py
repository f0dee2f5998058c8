"""The table of number types: complete, one to one, and the same as the libraries'."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from cogvideo.dtypes import (
    ACTIVATION_DTYPES,
    CODE_OF_DTYPE,
    DTYPE_OF_CODE,
    FILE_TYPES,
    FLOAT_DTYPES,
    STORAGE_OF_DTYPE,
    STORED_DTYPES,
    FloatName,
    WeightChoice,
    WeightName,
    dtype_name,
)
from cogvideo.tensor_file import TensorInfo, write_tensor_file


def test_names_in_configs_have_types() -> None:
    assert set(FLOAT_DTYPES) == set(get_args(FloatName))
    assert set(STORED_DTYPES) == set(ACTIVATION_DTYPES) == set(get_args(WeightName))
    assert all(dtype.is_floating_point for dtype in ACTIVATION_DTYPES.values())
    assert set(get_args(WeightChoice)) == {"auto", *get_args(WeightName)}


def test_each_type_has_its_own_code_and_storage() -> None:
    assert len(DTYPE_OF_CODE) == len(CODE_OF_DTYPE) == len(set(STORAGE_OF_DTYPE.values())) == len(FILE_TYPES)
    in_memory_only = {torch.float8_e4m3fn}
    assert set(STORED_DTYPES.values()) - in_memory_only <= CODE_OF_DTYPE.keys()
    assert dtype_name(torch.bfloat16) == "bfloat16"


@pytest.mark.parametrize("dtype", CODE_OF_DTYPE, ids=dtype_name)
def test_codes_are_those_of_the_safetensors_library(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    write_tensor_file(tmp_path / "x.safetensors", {"x": TensorInfo.of(tensor)}, lambda name: tensor)
    (read,) = load_file(str(tmp_path / "x.safetensors")).values()
    assert read.dtype == dtype and torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", STORAGE_OF_DTYPE, ids=dtype_name)
def test_storages_are_those_that_torch_makes(dtype: torch.dtype) -> None:
    name = STORAGE_OF_DTYPE[dtype].__name__
    assert torch.storage._get_dtype_from_pickle_storage_type(name) == dtype
