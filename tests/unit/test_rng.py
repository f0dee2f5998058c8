"""Random numbers depend on the position they are keyed by, and on nothing else."""

import numpy as np
import torch

from cogvideo.rng import (
    SampleKey,
    data_uniforms,
    generator_for,
    sample_keys,
    sample_uniforms,
    seed_dropout,
    stream_key,
)

KEY = SampleKey(7, "a red digit", 0)


def test_sample_uniforms_are_keyed_by_sample_round_and_frame() -> None:
    batch = sample_uniforms([KEY, SampleKey(7, "红色", 0)], 0, range(5), 16)
    assert batch.shape == (2, 5, 16, 2) and batch.dtype == torch.float64
    assert torch.equal(batch[:1, 2:4], sample_uniforms([KEY], 0, (2, 3), 16))
    others = [
        sample_uniforms([KEY], 1, (0,), 16),
        sample_uniforms([KEY._replace(seed=8)], 0, (0,), 16),
        sample_uniforms([KEY._replace(number=1)], 0, (0,), 16),
        sample_uniforms([KEY._replace(caption="a red digit ")], 0, (0,), 16),
    ]
    for other in others:
        assert not (other == batch[:1, :1]).any()


def test_sample_uniforms_never_change() -> None:
    """Users must be able to reproduce clips they made earlier."""
    assert (sample_uniforms([KEY], 0, (1,), 2) * 2**32).flatten().tolist() == FIXED


FIXED = [2990846738, 1239196489, 590997792, 456311712]


def test_sample_uniforms_are_uniform_in_range() -> None:
    numbers = sample_uniforms([KEY], 3, range(64), 100).numpy().reshape(-1)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=16, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 37.7  # 15 degrees of freedom: exceeded once in a thousand runs
    assert abs(np.corrcoef(numbers[::2], numbers[1::2])[0, 1]) < 0.05


def test_earlier_samples_of_a_caption_are_counted() -> None:
    seen = {"a": 3}
    assert [key.number for key in sample_keys(7, ["a", "b", "a"], 2, seen)] == [3, 4, 0, 1, 5, 6]
    assert seen == {"a": 7, "b": 2}


def test_a_repeated_caption_gets_new_sample_numbers() -> None:
    keys = sample_keys(1, ["a", "b", "a"], 2)
    assert [(key.caption, key.number) for key in keys] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]
    assert sample_keys(1, ["b"], 2) == keys[2:4]


def test_data_uniforms_are_keyed_by_position_and_stream() -> None:
    whole = data_uniforms(1, "dropout", np.arange(100))
    assert (data_uniforms(1, "dropout", [7, 50]) == whole[[7, 50]]).all()
    assert (data_uniforms(1, "frame", np.arange(100)) != whole).all()
    assert 0.35 < whole.mean() < 0.65


def test_stream_keys_depend_on_every_part_of_the_position() -> None:
    positions = [(0, "a", 1, 2), (0, "a", 2, 1), (0, "b", 1, 2), (1, "a", 1, 2), (0, "a", 12)]
    keys = [stream_key(*position) for position in positions]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 1 << 63 for key in keys)
    first = torch.rand(3, generator=generator_for(7, "x"))
    assert torch.equal(first, torch.rand(3, generator=generator_for(7, "x")))


def test_dropout_masks_are_the_same_at_the_same_position() -> None:
    def mask(*position: int) -> torch.Tensor:
        seed_dropout(*position)
        return torch.nn.functional.dropout(torch.ones(64), 0.5)

    assert torch.equal(mask(0, 3, 1), mask(0, 3, 1))
    assert not torch.equal(mask(0, 3, 1), mask(0, 3, 2))
