"""Which keys of a grid lie near each query of a grid as fine or finer, cut into tiles; and attention by those tiles.

A query at (y, x) sees the keys in `rows` by `columns` around its own place, (y // ratio, x // ratio) on the keys' grid.
Queries of a square tile share most of their keys, so a tile attends to the rectangle around it under a mask: instead
of 45 keys a query, each at its own address, a few hundred keys that a matrix product reads in one piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_LARGEST_TILE = 12
"""Queries along a side. Twelve: 144 queries look at 320 keys where each sees 45."""


@dataclass(frozen=True)
class Tiles:
    """Groups of queries, each with the keys that some of them see."""

    queries: Tensor
    """(tiles, queries): places on the fine grid, in raster order; every place is in one tile."""
    keys: Tensor
    """(tiles, keys) places among the keys; where `allowed` is False for all of a tile they mean nothing."""
    allowed: Tensor
    """(tiles or 1, queries or 1, keys) bool."""

    def to(self, device: torch.device) -> "Tiles":
        return Tiles(self.queries.to(device), self.keys.to(device), self.allowed.to(device))


def near(query_side: int, key_side: int, rows: int, columns: int, *, first_key: int = 0) -> Tiles:
    """Neighbourhoods of `rows` x `columns` (both odd) keys; keys are numbered from `first_key`, in raster order."""
    assert query_side % key_side == 0 and rows % 2 and columns % 2
    own_y, key_y, sees_y = _along_a_side(query_side, key_side, rows // 2)
    own_x, key_x, sees_x = _along_a_side(query_side, key_side, columns // 2)

    def crossed(ys: np.ndarray, xs: np.ndarray, side: int) -> np.ndarray:
        places = ys[:, None, :, None] * side + xs[None, :, None, :]
        return places.reshape(len(ys) * len(xs), -1)

    allowed = sees_y[:, None, :, None, :, None] & sees_x[None, :, None, :, None, :]
    queries, keys = crossed(own_y, own_x, query_side), crossed(key_y, key_x, key_side)
    return Tiles(
        torch.from_numpy(queries),
        torch.from_numpy(keys + first_key),
        torch.from_numpy(allowed.reshape(*queries.shape, keys.shape[1])),
    )


def all_of(tiles: Tiles, count: int) -> Tiles:
    """The same queries, seeing the first `count` keys, whichever they are."""
    keys = np.tile(np.arange(count), (len(tiles.queries), 1))
    return Tiles(tiles.queries, torch.from_numpy(keys), torch.from_numpy(np.ones((1, 1, count), bool)))


def _along_a_side(query_side: int, key_side: int, reach: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along one axis: queries (tiles, q), keys (tiles, k) kept on the grid, and who sees whom (tiles, q, k)."""
    ratio = query_side // key_side
    tile = max(size for size in range(1, _LARGEST_TILE + 1) if query_side % size == 0)
    queries = np.arange(query_side).reshape(-1, tile)
    own = queries // ratio
    first, last = own[:, :1] - reach, own[:, -1:] + reach
    keys = first + np.arange((last - first).max() + 1)
    sees = (abs(own[:, :, None] - keys[:, None, :]) <= reach) & ((keys >= 0) & (keys < key_side))[:, None, :]
    return queries, keys.clip(0, key_side - 1), sees


def attend_near(
    query: Tensor, sources: Sequence[tuple[Tensor, Tensor, Tiles, Tensor | None]], dropout: float = 0.0
) -> Tensor:
    """One softmax over the keys that each query sees in all sources, which cut the queries into the same tiles.

    A source is keys and values (batch, heads, its rows, head_dim), tiles, and what is added to the scores of its keys
    (batch, its rows), or None. Shapes: query (batch, heads, queries, head_dim) -> (batch, queries, heads * head_dim).
    """
    queries = sources[0][2].queries
    batch, num_tiles, size = len(query), *queries.shape
    keys, values, biases = [], [], []
    for key, value, tiles, added in sources:
        keys.append(key[:, :, tiles.keys])
        values.append(value[:, :, tiles.keys])
        bias = query.new_zeros(batch, num_tiles, size, tiles.keys.shape[1])
        bias.masked_fill_(~tiles.allowed, float("-inf"))
        biases.append(bias if added is None else bias + added.to(query.dtype)[:, tiles.keys].unsqueeze(2))
    fold = "b h t s d -> (b t) h s d"
    out = F.scaled_dot_product_attention(
        rearrange(query[:, :, queries], fold),
        rearrange(torch.cat(keys, dim=3), fold),
        rearrange(torch.cat(values, dim=3), fold),
        rearrange(torch.cat(biases, dim=3), "b t q k -> (b t) 1 q k"),
        dropout,
    )
    out = rearrange(out, "(b t) h q d -> b (t q) (h d)", b=batch)
    return out.index_select(1, queries.flatten().argsort())
