"""Splitting a tensor over model-parallel ranks and merging the shards again, as SwissArmyTransformer does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo.checkpoint.parameters import Split


def merge(shards: Sequence[Tensor], split: Split) -> Tensor:
    """The whole tensor from every rank's shard, in rank order. A single shard is returned uncopied."""
    if len(shards) == 1 or split is Split.REPLICATED:
        return shards[0]
    if split is Split.QKV:
        return torch.cat([shard.chunk(3, dim=0)[third] for third in range(3) for shard in shards])
    return torch.cat(list(shards), dim=1 if split is Split.COLUMNS else 0)


def shard(whole: Tensor, split: Split, rank: int, ranks: int) -> Tensor:
    """One rank's shard of a tensor, a view where possible. The axis must divide evenly, see `shard_shape`."""
    if ranks == 1 or split is Split.REPLICATED:
        return whole
    if split is Split.QKV:
        return torch.cat([third.chunk(ranks, dim=0)[rank] for third in whole.chunk(3, dim=0)])
    return whole.chunk(ranks, dim=1 if split is Split.COLUMNS else 0)[rank]


def shard_shape(shape: tuple[int, ...], split: Split, ranks: int) -> tuple[int, ...]:
    """The shape of one rank's shard. Raises: ValueError if the axis does not divide evenly."""
    if ranks == 1 or split is Split.REPLICATED:
        return shape
    axis = 1 if split is Split.COLUMNS else 0
    pieces = 3 * ranks if split is Split.QKV else ranks
    if shape[axis] % pieces:
        raise ValueError(f"a tensor of shape {list(shape)} cannot be split over {ranks} ranks; choose a divisor")
    return (*shape[:axis], shape[axis] // ranks, *shape[axis + 1 :])


def whole_shape(shape: tuple[int, ...], split: Split, ranks: int) -> tuple[int, ...]:
    """The shape of the whole tensor, from that of one rank's shard."""
    if ranks == 1 or split is Split.REPLICATED or not shape:
        return shape
    axis = min(1, len(shape) - 1) if split is Split.COLUMNS else 0
    return (*shape[:axis], shape[axis] * ranks, *shape[axis + 1 :])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type and shape are bitwise equal, NaNs included."""
    return one is other or torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
