"""Random numbers depend on what they are for, and on nothing else."""

import numpy as np
import torch

from cogvideo.rng import SampleKey, sample_keys, uniforms

KEY = SampleKey(7, "a red digit", 0)


def test_addressed_by_key_round_and_frame() -> None:
    together = uniforms([KEY, SampleKey(7, "红色", 0)], 0, range(5), 16)
    assert together.shape == (2, 5, 16, 2) and together.dtype == torch.float64
    assert torch.equal(together[:1, 2:4], uniforms([KEY], 0, (2, 3), 16))
    others = [
        uniforms([KEY], 1, (0,), 16),
        uniforms([KEY._replace(seed=8)], 0, (0,), 16),
        uniforms([KEY._replace(number=1)], 0, (0,), 16),
        uniforms([KEY._replace(caption="a red digit ")], 0, (0,), 16),
    ]
    for other in others:
        assert not (other == together[:1, :1]).any()


def test_values_are_fixed() -> None:
    """Clips that users made must come back: these numbers do not change."""
    assert (uniforms([KEY], 0, (1,), 2) * 2**32).flatten().tolist() == FIXED


FIXED = [2990846738, 1239196489, 590997792, 456311712]


def test_uniform_in_range() -> None:
    numbers = uniforms([KEY], 3, range(64), 100).numpy().reshape(-1)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=16, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 37.7  # 15 degrees of freedom: one run in a thousand is beyond
    assert abs(np.corrcoef(numbers[::2], numbers[1::2])[0, 1]) < 0.05


def test_what_was_seen_before_counts() -> None:
    seen = {"a": 3}
    assert [key.number for key in sample_keys(7, ["a", "b", "a"], 2, seen)] == [3, 4, 0, 1, 5, 6]
    assert seen == {"a": 7, "b": 2}


def test_a_repeated_caption_gets_fresh_numbers() -> None:
    keys = sample_keys(1, ["a", "b", "a"], 2)
    assert [(key.caption, key.number) for key in keys] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]
    assert sample_keys(1, ["b"], 2) == keys[2:4]
