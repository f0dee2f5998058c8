"""The fine grid: which keys each of its rows attends to, attention over them in tiles, and what each round redraws.

A query at (y, x) attends to `rows` x `columns` keys around (y // ratio, x // ratio) on the key grid, which is as fine
or coarser. Queries of one square tile share most of their keys, so a tile attends to the rectangle around it, with a
mask: instead of 45 keys per query, each at its own index, a few hundred keys that one matrix product reads in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from cogvideo.superres.config import SuperresConfig

MAX_TILE_SIDE = 12
"""Queries along a side of a tile. With 12, 144 queries read 320 keys, of which each attends to 45."""

ROUND_PATTERN = np.array(
    [
        [-1, 0, 1, 2, 3, 4],
        [0, -1, 2, -1, -2, 5],
        [1, -2, 3, 4, 5, 6],
        [2, 3, 4, 5, -1, 1],
        [3, -1, -2, 0, -1, 2],
        [4, 5, 6, 1, 3, -2],
    ]
)
"""Repeated over the fine grid: round m of the iterative model redraws the places whose number is at least m, all at
once. Each round redraws fewer places, so later tokens are drawn from more settled ones; places of 0 and below are never
redrawn. Source: CogView2's published code.
"""
ROUNDS = 6
"""Of the iterative model."""


@dataclass(frozen=True)
class QueryTiles:
    """Tiles of queries, each with the keys that any of its queries attends to."""

    queries: Tensor
    """(tiles, queries) raster indices of places on the fine grid; every place is in exactly one tile."""
    keys: Tensor
    """(tiles, keys) indices of keys; arbitrary where `allowed` is False for all queries of the tile."""
    allowed: Tensor
    """(tiles or 1, queries or 1, keys) bool: whether the query attends to the key."""

    def to(self, device: torch.device) -> "QueryTiles":
        return QueryTiles(self.queries.to(device), self.keys.to(device), self.allowed.to(device))


class KeySource(NamedTuple):
    """Keys and values that queries attend to in `tiles`. Shapes: key, value (batch, heads, rows, head_dim)."""

    key: Tensor
    value: Tensor
    tiles: QueryTiles
    bias: Tensor | None = None
    """(batch, rows), added to the scores of each key."""


def neighbourhood_tiles(query_side: int, key_side: int, rows: int, columns: int, *, first_key: int = 0) -> QueryTiles:
    """Tiles where each query attends to `rows` x `columns` keys (both odd) around it, cut off at the grid's edge.

    Keys are numbered in raster order from `first_key`.
    """
    assert query_side % key_side == 0 and rows % 2 and columns % 2
    query_y, key_y, allowed_y = _tiles_along_axis(query_side, key_side, rows // 2)
    query_x, key_x, allowed_x = _tiles_along_axis(query_side, key_side, columns // 2)

    def cross(ys: NDArray[np.int64], xs: NDArray[np.int64], side: int) -> NDArray[np.int64]:
        """Raster indices of every (tile row, tile column): (tiles_y * tiles_x, ys per tile * xs per tile)."""
        places = ys[:, None, :, None] * side + xs[None, :, None, :]
        return places.reshape(len(ys) * len(xs), -1)

    # a query attends to a key if it may along both axes: (tiles y, tiles x, queries y, queries x, keys y, keys x)
    allowed = allowed_y[:, None, :, None, :, None] & allowed_x[None, :, None, :, None, :]
    queries, keys = cross(query_y, query_x, query_side), cross(key_y, key_x, key_side)
    return QueryTiles(
        torch.from_numpy(queries),
        torch.from_numpy(keys + first_key),
        torch.from_numpy(allowed.reshape(*queries.shape, keys.shape[1])),
    )


def full_tiles(tiles: QueryTiles, num_keys: int) -> QueryTiles:
    """The same query tiles, where every query attends to keys 0 to `num_keys` - 1."""
    keys = np.tile(np.arange(num_keys), (len(tiles.queries), 1))
    return QueryTiles(tiles.queries, torch.from_numpy(keys), torch.from_numpy(np.ones((1, 1, num_keys), bool)))


def _tiles_along_axis(
    query_side: int, key_side: int, reach: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Along one axis: queries (tiles, q), keys clipped to the grid (tiles, k), and allowed pairs (tiles, q, k)."""
    ratio = query_side // key_side
    tile = max(size for size in range(1, MAX_TILE_SIDE + 1) if query_side % size == 0)
    queries = np.arange(query_side).reshape(-1, tile)
    centres = queries // ratio
    # the keys of a tile: from `reach` before its first centre to `reach` after its last, equally many for all tiles
    first, last = centres[:, :1] - reach, centres[:, -1:] + reach
    keys = first + np.arange((last - first).max() + 1)
    on_grid = (keys >= 0) & (keys < key_side)
    allowed = (abs(centres[:, :, None] - keys[:, None, :]) <= reach) & on_grid[:, None, :]
    return queries, keys.clip(0, key_side - 1), allowed


def attend_in_tiles(query: Tensor, sources: Sequence[KeySource], dropout: float = 0.0) -> Tensor:
    """Attention with one softmax over the keys of all sources, whose tiles must have the same queries.

    Shapes: query (batch, heads, queries, head_dim) -> (batch, queries, heads * head_dim).
    """
    queries = sources[0].tiles.queries
    batch, num_tiles, tile_len = len(query), *queries.shape
    keys, biases, num_rows = [], [], 0
    for source in sources:
        tiles = source.tiles
        keys.append(tiles.keys + num_rows)
        num_rows += source.key.shape[2]
        bias = query.new_zeros(batch, num_tiles, tile_len, tiles.keys.shape[1])
        bias.masked_fill_(~tiles.allowed, float("-inf"))
        if source.bias is not None:
            bias = bias + source.bias.to(query.dtype)[:, tiles.keys].unsqueeze(2)
        biases.append(bias)
    # the rows of all sources are joined before they are copied into tiles: there are far fewer of them
    joined = torch.cat(keys, dim=1)
    key = torch.cat([source.key for source in sources], dim=2)[:, :, joined]
    value = torch.cat([source.value for source in sources], dim=2)[:, :, joined]
    tiles_to_batch = "b h t s d -> (b t) h s d"
    out = F.scaled_dot_product_attention(
        rearrange(query[:, :, queries], tiles_to_batch),
        rearrange(key, tiles_to_batch),
        rearrange(value, tiles_to_batch),
        rearrange(torch.cat(biases, dim=3), "b t q k -> (b t) 1 q k"),
        dropout,
    )
    out = rearrange(out, "(b t) h q d -> b (t q) (h d)", b=batch)
    return out.index_select(1, queries.flatten().argsort())  # back to raster order


def redraw_mask(side: int, round_number: int) -> Tensor:
    """Places of a `side` x `side` grid that a round of the iterative model (from 1) redraws: (side * side,) bool."""
    assert 1 <= round_number <= ROUNDS
    y, x = np.divmod(np.arange(side * side), side)
    return torch.from_numpy(ROUND_PATTERN[y % 6, x % 6] >= round_number)


def round_masks(config: SuperresConfig) -> Tensor:
    """Places that each of a model's rounds draws: (rounds, high_res_len) bool. The direct model draws all in one."""
    if config.method == "direct":
        return torch.ones(1, config.high_res_len, dtype=torch.bool)
    return torch.stack([redraw_mask(config.high_res_side, i) for i in range(1, ROUNDS + 1)])
