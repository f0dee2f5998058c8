"""Intervals and standard errors against values worked out elsewhere."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.evaluation.statistics import Mean, Proportion, proportion


def test_wilson_interval_of_a_textbook_case():
    low, high = Proportion(8, 10).interval  # Wilson, 95 %
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_holds_its_value_and_stays_in_range(case):
    figure = Proportion(*case)
    low, high = figure.interval
    assert 0 <= low <= figure.value + 1e-12 and figure.value - 1e-12 <= high <= 1


def test_counts_and_means():
    assert proportion(np.array([True, False, True])) == Proportion(2, 3)
    mean = Mean.of(np.array([1.0, 3.0]))
    assert (mean.value, mean.standard_error, mean.total) == (2.0, pytest.approx(1.0), 2)
    assert Mean.of(np.array([2.0])).to_json() == {"value": 2.0, "standard_error": None, "total": 1}
    assert math.isnan(Mean.of(np.array([])).value) and math.isnan(Proportion(0, 0).value)
