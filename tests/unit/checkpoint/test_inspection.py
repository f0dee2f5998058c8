"""What `cogvideo inspect` prints about checkpoints and configs."""

from pathlib import Path

import pytest
import torch

from cogvideo.checkpoint.format import load_checkpoint, save_checkpoint
from cogvideo.checkpoint.inspection import describe_files, describe_parameters, describe_tensors
from cogvideo.checkpoint.load import save_model
from cogvideo.model.config import ModelConfig
from cogvideo.superres.config import SuperresConfig
from tests.helpers.models import tiny_config, tiny_model


def test_published_counts() -> None:
    text = describe_parameters(ModelConfig())
    assert "video model, 48 layers of 3072" in text
    assert "7,721,127,936  1,818,820,608 trainable, 5,902,307,328 frozen" in text
    free = describe_parameters(ModelConfig(), frozen_trunk=False)
    assert "7,721,127,936 trainable, 0 frozen" in free


def test_super_resolution() -> None:
    assert "high-resolution attention" in describe_parameters(SuperresConfig())
    iterative = describe_parameters(SuperresConfig(method="iterative"))
    assert "5,913,366,528 trainable, 0 frozen" in iterative


def test_a_checkpoint_and_its_values(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("sequential"))
    with torch.no_grad():
        model.layers[1].mlp.dense_h_to_4h.bias[:3] = torch.nan
    save_model(tmp_path / "stage1", model, extra={"step": 700})
    checkpoint = load_checkpoint(tmp_path / "stage1")
    files = describe_files(checkpoint, verified=True)
    assert "2 files" in files
    assert "all hashes match" in files
    assert "step: 700" in files
    text = describe_parameters(model.config, checkpoint, values=True)
    mlp = next(line for line in text.splitlines() if line.startswith("  MLP"))
    assert "float32, rms 0." in mlp
    assert mlp.endswith("3 NOT FINITE")
    assert text.count("NOT FINITE") == 1


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "stage1", tiny_model(tiny_config("sequential")))
    with pytest.raises(ValueError, match="does not fit"):
        describe_parameters(tiny_config("sequential", num_layers=2), load_checkpoint(tmp_path / "stage1"))


def test_tensors_of_other_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", {"a.weight": torch.zeros(2, 3)}, {})
    assert "a.weight" in describe_tensors(load_checkpoint(tmp_path / "other"))
