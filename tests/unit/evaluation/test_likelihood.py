"""Scores of clips: equal to a dense reference and the model's own loss, in any chunks, written row by row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvideo.evaluation import likelihood
from cogvideo.evaluation.likelihood import FrameMeans, open_score_file, token_losses
from cogvideo.model.plan import plan_forward
from tests.helpers.models import tiny_batch, tiny_config, tiny_model
from tests.reference import transformer as reference


@pytest.mark.parametrize("task", ["sequential", "interpolation"])
@pytest.mark.parametrize("chunk", [7, 2048])
def test_every_frame_is_scored(task: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_ROWS", chunk)
    model = tiny_model(tiny_config(task))  # type: ignore[arg-type]
    batch = tiny_batch(model.config)
    logits_out = np.zeros((2, 80, 20), np.float32)
    losses = torch.from_numpy(token_losses(model, plan_forward(model.config), batch, logits_out))

    logits, _ = reference.forward(dict(model.state_dict()), model.config, batch.text, batch.text_mask, batch.frames)
    torch.testing.assert_close(torch.from_numpy(logits_out), logits.float(), atol=1e-5, rtol=1e-4)
    expected = -logits.log_softmax(-1).gather(-1, batch.frames.flatten(1)[..., None])[..., 0]
    torch.testing.assert_close(losses.flatten(1), expected.float(), atol=1e-5, rtol=1e-4)
    supervised = list(model.config.layout.supervised_frames)
    torch.testing.assert_close(losses[:, supervised], model.token_losses(batch), atol=1e-5, rtol=1e-4)


def test_means_by_frame() -> None:
    means = FrameMeans(5)
    means.add(np.full((1, 5, 16), 1.0, np.float32))
    means.add(np.arange(5, dtype=np.float32)[None, :, None] + np.zeros((3, 5, 16), np.float32))
    summary = means.summary(tiny_config("interpolation"))
    assert "4 clips" in summary
    assert "frame 0  given   0.250000" in summary
    assert "frame 3  learned 2.500000" in summary
    assert f"all learned       {(1 + 2.5) / 2:.6f}" in summary


def test_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with open_score_file(path, {"losses": (3, 2), "logits": (3, 2, 4)}) as arrays:
        for row in range(3):
            arrays["losses"][row] = row
            arrays["logits"][row] = 10 * row
        assert not path.exists()
    read = load_file(path)
    assert read["losses"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert read["logits"][:, 1, 3].tolist() == [0, 10, 20]


def test_disk_space_is_allocated_before_scores_are_written(tmp_path: Path) -> None:
    with open_score_file(tmp_path / "scores.safetensors", {"losses": (1000, 500)}):
        (file,) = tmp_path.iterdir()
        assert file.stat().st_blocks * 512 >= 4 * 1000 * 500


def test_an_interrupted_file_never_appears(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_score_file(tmp_path / "scores.safetensors", {"losses": (3, 2)}):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
