"""Tiny checkpoints in the published format, with the tensor names of every kind of model and random values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo.checkpoint.parameters import ModelKind, model_parameters
from cogvideo.checkpoint.sat.config import SatSettings, VocabularyIds
from cogvideo.checkpoint.sat.shard import shard
from tests.helpers.sat import WriteSat, sat_tensors


@pytest.fixture
def settings() -> SatSettings:
    """For the tiny vocabulary and grid: 16 image tokens, frames of 2x2."""
    return SatSettings(
        vocab=VocabularyIds(16, 16, 17, 18), num_heads=2, frame_side=2, text_len=8, frame_position_start=8
    )


@pytest.fixture
def write_sat(tmp_path: Path) -> WriteSat:
    """Write a SAT folder of a kind; `rename` changes tensor names, `change` edits each rank's dict."""

    def write(
        kind: ModelKind,
        folder: str = "sat",
        *,
        ranks: int = 1,
        config: dict[str, Any] | None = None,
        rename: Callable[[str], str] = lambda name: name,
        change: Callable[[dict[str, Any], int], None] = lambda tensors, rank: None,
    ) -> Path:
        root = tmp_path / folder
        (root / "7").mkdir(parents=True)
        (root / "latest").write_text("7\n")
        (root / "model_config.json").write_text(json.dumps({"cogvideo_stage": 1} if config is None else config))
        whole = sat_tensors(kind)
        split = {p.sat_name: p.split for p in model_parameters(kind, 2)}
        for rank in range(ranks):
            tensors: dict[str, Any] = {
                rename(name): shard(tensor, split[name], rank, ranks).clone() for name, tensor in whole.items()
            }
            change(tensors, rank)
            torch.save({"module": tensors, "iteration": 7}, root / "7" / f"mp_rank_{rank:02d}_model_states.pt")
        return root

    return write
