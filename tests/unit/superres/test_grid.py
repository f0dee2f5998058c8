"""Tiles against the definition, place by place, and attention by tiles against dense masks."""

import numpy as np
import pytest
import torch

from cogvideo.superres.grid import all_of, attend_near, near
from cogvideo.superres.rounds import PATTERN, TOP_K, redrawn

SIZES = [(60, 60), (60, 20), (6, 2), (14, 7), (7, 7), (1, 1), (13, 1)]


def dense(query_side: int, key_side: int, rows: int, columns: int) -> np.ndarray:
    """(queries, keys) bool, from the definition."""
    ratio = query_side // key_side
    mask = np.zeros((query_side, query_side, key_side, key_side), bool)
    for y in range(query_side):
        for x in range(query_side):
            for dy in range(rows):
                for dx in range(columns):
                    key_y, key_x = y // ratio - rows // 2 + dy, x // ratio - columns // 2 + dx
                    if 0 <= key_y < key_side and 0 <= key_x < key_side:
                        mask[y, x, key_y, key_x] = True
    return mask.reshape(query_side**2, key_side**2)


@pytest.mark.parametrize(("rows", "columns"), [(9, 5), (5, 5), (1, 3)])
@pytest.mark.parametrize(("query_side", "key_side"), SIZES)
def test_tiles_hold_each_neighbour_once(query_side: int, key_side: int, rows: int, columns: int) -> None:
    tiles = near(query_side, key_side, rows, columns, first_key=4)
    seen = np.zeros((query_side**2, 4 + key_side**2), int)
    for queries, keys, allowed in zip(tiles.queries, tiles.keys, tiles.allowed, strict=True):
        for key, of_key in zip(keys, allowed.T, strict=True):
            seen[queries[of_key], key] += 1
    assert (seen[:, :4] == 0).all()
    assert np.array_equal(seen[:, 4:], dense(query_side, key_side, rows, columns))


@pytest.mark.parametrize("side", [6, 12, 9])
def test_attention_by_tiles_is_dense_attention(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    own, few = near(side, side, 9, 5), side // 3
    cross, text_len = near(side, few, 5, 5, first_key=3), 3
    context_len = text_len + few**2

    def heads(rows: int) -> torch.Tensor:
        return torch.randn(2, 4, rows, 8, generator=generator)

    query, key, value = heads(side**2), heads(side**2), heads(side**2)
    context_key, context_value = heads(context_len), heads(context_len)
    added = torch.zeros(2, context_len)
    added[0, 0], added[1, 2] = float("-inf"), 0.7
    for context, sees in (
        (cross, np.pad(dense(side, few, 5, 5), ((0, 0), (text_len, 0)))),
        (all_of(own, text_len), np.pad(np.ones((side**2, text_len), bool), ((0, 0), (0, few**2)))),
    ):
        sources = (context_key, context_value, context, added), (key, value, own, None)
        made = attend_near(query, sources)
        mask = torch.from_numpy(np.concatenate([sees, dense(side, side, 9, 5)], axis=1))
        bias = torch.zeros(2, 1, *mask.shape).masked_fill(~mask, float("-inf"))
        bias[..., :context_len] += added[:, None, None, :]
        weights = (query @ torch.cat([context_key, key], 2).transpose(-1, -2) / 8**0.5 + bias).softmax(-1)
        expected = (weights @ torch.cat([context_value, value], 2)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_rounds_redraw_fewer_and_fewer_of_the_same_places() -> None:
    before = torch.ones(60 * 60, dtype=torch.bool)
    for number in range(1, len(TOP_K) + 1):
        places = redrawn(60, number)
        assert (before | ~places).all() and places.sum() < before.sum()
        before = places
    assert redrawn(5, 1).view(5, 5).tolist() == (PATTERN[:5, :5] >= 1).tolist(), "a grid need not be whole patterns"
