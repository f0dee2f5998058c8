"""Cutting a tensor over model-parallel ranks and putting it together again, as SwissArmyTransformer does it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo.checkpoint.sat.names import Split


def merge(parts: Sequence[Tensor], split: Split) -> Tensor:
    """The whole tensor from every rank's part, in rank order. One part is returned as it is, uncopied."""
    if len(parts) == 1 or split is Split.REPLICATED:
        return parts[0]
    if split is Split.QKV:
        return torch.cat([part.chunk(3, dim=0)[third] for third in range(3) for part in parts])
    return torch.cat(list(parts), dim=1 if split is Split.COLUMNS else 0)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type and shape are equal to the last bit, NaNs included."""
    return one is other or torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def part_of(whole: Tensor, split: Split, rank: int, ranks: int) -> Tensor:
    """What one rank holds of a tensor; a view where that can be. The axis must divide, see `check_divides`."""
    if ranks == 1 or split is Split.REPLICATED:
        return whole
    if split is Split.QKV:
        return torch.cat([third.chunk(ranks, dim=0)[rank] for third in whole.chunk(3, dim=0)])
    return whole.chunk(ranks, dim=1 if split is Split.COLUMNS else 0)[rank]


def part_shape(shape: tuple[int, ...], split: Split, ranks: int) -> tuple[int, ...]:
    """The shape of one rank's part. Raises: ValueError if the axis does not divide evenly."""
    if ranks == 1 or split is Split.REPLICATED:
        return shape
    axis = 1 if split is Split.COLUMNS else 0
    pieces = 3 * ranks if split is Split.QKV else ranks
    if shape[axis] % pieces:
        raise ValueError(f"a tensor of shape {list(shape)} cannot be cut over {ranks} ranks; choose a divisor")
    return (*shape[:axis], shape[axis] // ranks, *shape[axis + 1 :])


def whole_shape(shape: tuple[int, ...], split: Split, ranks: int) -> tuple[int, ...]:
    """The shape of the whole from one rank's."""
    if ranks == 1 or split is Split.REPLICATED or not shape:
        return shape
    axis = min(1, len(shape) - 1) if split is Split.COLUMNS else 0
    return (*shape[:axis], shape[axis] * ranks, *shape[axis + 1 :])
