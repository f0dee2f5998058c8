"""Intervals and standard errors against known values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.evaluation.statistics import Mean, Proportion


def test_wilson_interval_of_a_textbook_case():
    low, high = Proportion(8, 10).interval  # Wilson, 95 %
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_contains_the_value_and_stays_in_range(case):
    figure = Proportion(*case)
    low, high = figure.interval
    assert 0 <= low <= figure.value + 1e-12 and figure.value - 1e-12 <= high <= 1


def test_counts_and_means():
    assert Proportion.from_trials(np.array([True, False, True])) == Proportion(2, 3)
    mean = Mean.from_values(np.array([1.0, 3.0]))
    assert (mean.value, mean.standard_error, mean.total) == (2.0, pytest.approx(1.0), 2)
    assert Mean.from_values(np.array([2.0])).to_json() == {"value": 2.0, "standard_error": None, "total": 1}
    assert math.isnan(Mean.from_values(np.array([])).value) and math.isnan(Proportion(0, 0).value)


def test_figures_as_text():
    assert [str(Proportion(8, 10)), str(Proportion(0, 0))] == ["80.0 % [49.0, 94.3]", "-"]
    means = [Mean.from_values(values) for values in ([1.0, 3.0], [2.0], [])]
    assert list(map(str, means)) == ["2.000 ± 1.000", "2.000", "-"]
