"""Proportions of a mixture: exact in every cycle, and equal within a group."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideo.data.mixing import CYCLE, Mixture


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_every_cycle_holds_each_group_as_often_as_its_weight_says(sizes, weights, seed):
    ends = np.cumsum(sizes)
    groups, weights = np.split(np.arange(ends[-1]), ends[:-1]), weights[: len(sizes)]
    mixture = Mixture(groups, weights, seed)
    cycles = [mixture.rows(np.arange(start, start + CYCLE)) for start in (0, CYCLE)]
    for rows in cycles:
        seen = [np.isin(rows, group).sum() for group in groups]
        assert np.abs(np.array(seen) - CYCLE * np.array(weights) / sum(weights)).max() < 1
    counts = np.bincount(np.concatenate(cycles), minlength=ends[-1])
    assert all(np.ptp(part) <= 1 for part in np.split(counts, ends[:-1]))
    alone = np.concatenate([mixture.rows(np.arange(rank, 24, 3)) for rank in range(3)])
    assert sorted(alone) == sorted(mixture.rows(np.arange(24))), "a row depends on its position alone"


def test_the_order_depends_on_the_seed():
    first, second = (Mixture([np.arange(50), np.arange(50, 60)], [1, 1], seed).rows(np.arange(40)) for seed in (0, 1))
    assert not np.array_equal(first, second)
