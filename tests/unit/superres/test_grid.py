"""Query tiles against the definition, place by place; attention in tiles against dense masks; rounds."""

import numpy as np
import pytest
import torch

from cogvideo.superres.grid import (
    ROUND_PATTERN,
    ROUNDS,
    KeySource,
    attend_in_tiles,
    full_tiles,
    neighbourhood_tiles,
    redraw_mask,
    round_masks,
)
from tests.helpers.superres import TINY_CONFIGS, TINY_DIRECT

SIZES = [(60, 60), (60, 20), (6, 2), (14, 7), (7, 7), (1, 1), (13, 1)]


def dense_mask(query_side: int, key_side: int, rows: int, columns: int) -> np.ndarray:
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
    tiles = neighbourhood_tiles(query_side, key_side, rows, columns, first_key=4)
    count = np.zeros((query_side**2, 4 + key_side**2), int)
    for queries, keys, allowed in zip(tiles.queries, tiles.keys, tiles.allowed, strict=True):
        for key, allowed_of_key in zip(keys, allowed.T, strict=True):
            count[queries[allowed_of_key], key] += 1
    assert (count[:, :4] == 0).all()
    assert np.array_equal(count[:, 4:], dense_mask(query_side, key_side, rows, columns))


@pytest.mark.parametrize("side", [6, 12, 9])
def test_attention_in_tiles_matches_dense_attention(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    coarse_side, text_len = side // 3, 3
    fine = neighbourhood_tiles(side, side, 9, 5)
    coarse = neighbourhood_tiles(side, coarse_side, 5, 5, first_key=text_len)
    context_len = text_len + coarse_side**2

    def heads(rows: int) -> torch.Tensor:
        return torch.randn(2, 4, rows, 8, generator=generator)

    query, key, value = heads(side**2), heads(side**2), heads(side**2)
    context_key, context_value = heads(context_len), heads(context_len)
    key_bias = torch.zeros(2, context_len)
    key_bias[0, 0], key_bias[1, 2] = float("-inf"), 0.7
    for tiles, context_mask in (
        (coarse, np.pad(dense_mask(side, coarse_side, 5, 5), ((0, 0), (text_len, 0)))),
        (full_tiles(fine, text_len), np.pad(np.ones((side**2, text_len), bool), ((0, 0), (0, coarse_side**2)))),
    ):
        sources = KeySource(context_key, context_value, tiles, key_bias), KeySource(key, value, fine)
        actual = attend_in_tiles(query, sources)
        mask = torch.from_numpy(np.concatenate([context_mask, dense_mask(side, side, 9, 5)], axis=1))
        bias = torch.zeros(2, 1, *mask.shape).masked_fill(~mask, float("-inf"))
        bias[..., :context_len] += key_bias[:, None, None, :]
        weights = (query @ torch.cat([context_key, key], 2).transpose(-1, -2) / 8**0.5 + bias).softmax(-1)
        expected = (weights @ torch.cat([context_value, value], 2)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_each_round_redraws_a_subset_of_the_round_before() -> None:
    before = torch.ones(60 * 60, dtype=torch.bool)
    for number in range(1, ROUNDS + 1):
        places = redraw_mask(60, number)
        assert (before | ~places).all() and places.sum() < before.sum()
        before = places
    assert redraw_mask(5, 1).view(5, 5).tolist() == (ROUND_PATTERN[:5, :5] >= 1).tolist(), (
        "the side need not be a multiple of the pattern's"
    )


def test_round_masks_follow_the_pattern() -> None:
    assert round_masks(TINY_DIRECT).all() and len(round_masks(TINY_DIRECT)) == 1
    rounds = round_masks(TINY_CONFIGS["iterative"])
    assert rounds.shape == (6, 144)
    for number, places in enumerate(rounds, 1):
        assert places.view(12, 12)[6:, :6].tolist() == (number <= ROUND_PATTERN).tolist()
