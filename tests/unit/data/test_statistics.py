"""Codes in use and caption lengths: the right counts."""

import numpy as np

from cogvideo.data.statistics import CaptionLengths, CodeUse, spread


def test_codes_in_use() -> None:
    six = CodeUse.count(np.arange(12).reshape(2, 6) % 6, 1024)
    assert str(six) == "6 of 1,024 image codes in use"
    assert not six.is_low  # of twelve tokens
    assert CodeUse.count(np.arange(10_000) % 6, 1024).is_low
    assert not CodeUse.count(np.arange(10_000) % 103, 1024).is_low


def test_caption_lengths() -> None:
    texts = [(4.0, "x" * length) for length in range(1, 101)]
    counts = CaptionLengths.count(texts, lambda _, text: [0] * (len(text) + 5), lambda text: len(text) > 20)
    assert (counts.longest, counts.num_above(105), counts.num_above(65), counts.spelled_share) == (105, 0, 40, 0.2)
    assert counts.summary(65) == (
        "captions take at most 105 text tokens with clip length and suffix (99 %: 104); "
        "40 of 100 (40%) take more than 65"
    )


def test_samples_are_evenly_spaced() -> None:
    assert spread(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread(101, 5).tolist() == [0, 25, 50, 75, 100]
