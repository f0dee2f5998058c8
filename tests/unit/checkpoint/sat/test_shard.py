"""Tensors split over model-parallel ranks and merged again."""

import pytest
import torch

from cogvideo.checkpoint.parameters import Split
from cogvideo.checkpoint.sat.shard import merge, shard, shard_shape, whole_shape


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("split", list(Split))
def test_shards_merge_to_the_whole(split: Split, ranks: int) -> None:
    whole = torch.arange(24.0 * 8).reshape(24, 8)
    shards = [shard(whole, split, rank, ranks) for rank in range(ranks)]
    assert torch.equal(merge(shards, split), whole)
    for one in shards:
        assert tuple(one.shape) == shard_shape((24, 8), split, ranks)
        assert whole_shape(tuple(one.shape), split, ranks) == (24, 8)


def test_qkv_shards_hold_blocks_of_q_k_and_v() -> None:
    """SAT splits into 3 * ranks chunks; rank k holds chunks k, k + ranks and k + 2 * ranks."""
    whole = torch.arange(12.0)
    assert shard(whole, Split.QKV, 1, 2).tolist() == [2, 3, 6, 7, 10, 11]


def test_ranks_must_divide_the_axis() -> None:
    with pytest.raises(ValueError, match="5 ranks"):
        shard_shape((24, 8), Split.ROWS, 5)
