"""Parts of the page about prepared data."""

import numpy as np

from cogvideo.evaluation.data_report import _binned, _by_edges, kind_of_reason


def test_reasons_that_differ_in_names_and_numbers_only_are_one_kind():
    one = kind_of_reason("no clip fits between 0 s and 0.08 s of b/a1.mp4", "b/a1.mp4")
    assert one == kind_of_reason("no clip fits between 2.5 s and 3 s of c.mp4", "c.mp4")
    assert kind_of_reason("near-duplicate of x.mp4, distance 0.20 of 255 is below", "y.mp4") == kind_of_reason(
        "near-duplicate of z.mp4, distance 0.3 of 255 is below", "w.mp4"
    )


def test_bins_hold_every_value_once():
    assert _binned([]) == []
    assert _binned([5, 5]) == [("5 to 6", 2)]
    assert sum(count for _, count in _binned(np.linspace(0.1, 97, 50))) == 50
    assert _by_edges(np.array([0.5, 1.0, 3.0, 9.0]), (1, 2, 4)) == [
        ("below 1", 1),
        ("1 to 2", 1),
        ("2 to 4", 1),
        ("4 or more", 1),
    ]
