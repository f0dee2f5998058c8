"""Published folders: found, checked, merged over ranks; errors name what is wrong in one line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo.checkpoint.sat.config import SatSettings
from cogvideo.checkpoint.sat.convert import to_sat
from cogvideo.checkpoint.sat.reader import SatCheckpoint
from tests.helpers.sat import WriteSat, convert, ignore_progress


def test_the_folder_is_found_at_any_depth(write_sat: WriteSat, tmp_path: Path) -> None:
    source = write_sat("video", "deep/er/cogvideo-stage1")
    for start in (tmp_path / "deep", source, source / "7"):
        assert SatCheckpoint(start).directory == source
    shutil.copytree(source, tmp_path / "deep" / "other")
    with pytest.raises(ValueError, match="2 checkpoints"):
        SatCheckpoint(tmp_path / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no `latest`"):
        SatCheckpoint(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder"):
        SatCheckpoint(tmp_path / "absent")


def add(name: str) -> Any:
    return lambda tensors, rank: tensors.update({name: torch.zeros(2).half()})


def cut(name: str) -> Any:
    return lambda tensors, rank: tensors.pop(name)


QKV = "transformer.layers.1.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (add("transformer.layers.0.gate.weight"), r"no video model has: transformer\.layers\.0\.gate\.weight"),
        (cut(QKV), r"lacks tensors of a video model: " + QKV),
        (cut("mixins.attention_plus.attn_distribution.1"), "attn_distribution.1"),
        (cut("transformer.word_embeddings.weight"), "has no transformer.word_embeddings.weight"),
        (add("word_embeddings.weight"), "twice"),
        (lambda t, rank: t.update({QKV: t[QKV][:, :4].clone()}), QKV),
        (lambda t, rank: t.update({QKV: t[QKV].T}), "not contiguous"),
        (lambda t, rank: t.update({QKV: t[QKV].long()}), QKV),
        (lambda t, rank: t.update({QKV: "text"}), "is a str"),
        (lambda t, rank: t.update({QKV: torch.zeros(1).half().expand(24, 8)}), QKV),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_wrong_tensors_are_named(
    write_sat: WriteSat, tmp_path: Path, settings: SatSettings, change: Any, wrong: str, ranks: int
) -> None:
    source = write_sat("video", ranks=ranks, change=change)
    with pytest.raises(ValueError, match=wrong):
        convert(source, tmp_path / "ours", settings)
    assert not (tmp_path / "ours").exists()


def test_ranks_that_differ(write_sat: WriteSat) -> None:
    other_type = write_sat(
        "video", "a", ranks=2, change=lambda t, rank: t.update({QKV: t[QKV].float()} if rank else {})
    )
    with pytest.raises(ValueError, match=QKV):
        SatCheckpoint(other_type)
    one_less = write_sat("video", "b", ranks=2, change=lambda t, rank: t.pop(QKV) if rank else None)
    with pytest.raises(ValueError, match="rank 0: " + QKV):
        SatCheckpoint(one_less)


def test_a_rank_that_is_missing(write_sat: WriteSat) -> None:
    source = write_sat("video", ranks=2)
    os.remove(source / "7" / "mp_rank_00_model_states.pt")
    with pytest.raises(FileNotFoundError, match=r"mp_rank_00_model_states.pt is missing"):
        SatCheckpoint(source)
    lost = write_sat("video", "lost", ranks=4)
    os.remove(lost / "7" / "mp_rank_03_model_states.pt")  # the last one: only shapes show that it is missing
    with pytest.raises(FileNotFoundError, match=r"mp_rank_03_model_states.pt is missing.*4 ranks"):
        SatCheckpoint(lost)


def test_shapes_take_precedence_over_model_parallel_size(
    write_sat: WriteSat, tmp_path: Path, settings: SatSettings
) -> None:
    """A merged checkpoint still has the model_config.json of the ranks it was merged from."""
    source = write_sat("video", config={"cogvideo_stage": 1, "model_parallel_size": 4})
    convert(source, tmp_path / "ours", settings)
    to_sat(tmp_path / "ours", tmp_path / "back").run(ignore_progress)
    assert json.loads((tmp_path / "back" / "model_config.json").read_text())["model_parallel_size"] == 1


@pytest.mark.parametrize("text", ["../../etc", "7/../8", "", "latest", "9" * 40])
def test_latest_cannot_lead_elsewhere(write_sat: WriteSat, text: str) -> None:
    source = write_sat("video")
    (source / "latest").write_text(text)
    with pytest.raises(ValueError, match="iteration number"):
        SatCheckpoint(source)
