"""Sizes of super-resolution models: what is refused, and what the shipped tiny configs hold."""

from pathlib import Path

import pytest

from cogvideo.config import load_config
from cogvideo.data.prepare import PrepareConfig
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.training.config import TrainConfig

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_tiny_training_configs(method: str) -> None:
    config = load_config(TrainConfig, [ROOT / f"configs/train/tiny_superres_{method}.yaml"])
    assert (config.task, config.superres.method) == ("superres", method)
    assert config.init.checkpoint is None and not config.init.freeze_trunk  # the codes are another tokenizer's
    assert config.superres.low_res_position_start == config.model.frame_position_start + 1
    pairs = load_config(PrepareConfig, [ROOT / "configs/data/digits_pairs.yaml"])
    sides = (config.superres.low_res_side, config.superres.high_res_side)
    assert sides == (pairs.low_res_pixels // 8, pairs.frame_pixels // 8)


def test_every_round_has_targets() -> None:
    """The loss of a round without targets would be a mean over nothing."""
    with pytest.raises(ValueError, match=r"high_res_side=5 leaves some rounds .* nothing to redraw; give at least 6"):
        SuperresConfig(method="iterative", high_res_side=5)
    assert round_masks(SuperresConfig(method="iterative", high_res_side=6)).any(1).all()
