"""Kernel distance, precision and recall, and Inception Score against their definitions."""

import numpy as np
import pytest

from cogvideo.evaluation import feature_metrics
from cogvideo.evaluation.feature_metrics import inception_score, kernel_distance, precision_and_recall


def test_kernel_distance_is_the_sum_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_metrics, "BLOCK", 2)  # several blocks, the last one short
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))

    def kernel(a, b) -> float:
        return (a @ b / 3 + 1) ** 3

    same_x = np.mean([kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    same_y = np.mean([kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(same_x + same_y - 2 * across, rel=1e-12)


def test_kernel_distance_sees_a_shift() -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 400, 8))
    assert abs(kernel_distance(x, y)) < 0.1 < kernel_distance(x, y + 1)


def test_precision_and_recall_of_sets_on_a_line() -> None:
    real = np.arange(10.0)[:, None]
    narrow = np.array([0.0, 0.1, 0.2, 0.3, 100.0])[:, None]
    # k = 1: real balls reach 1; those around the first four reach 0.1, the one around 100 reaches 99.7.
    assert precision_and_recall(real, narrow, neighbours=1) == (0.8, 1.0)
    assert precision_and_recall(real, narrow[:4], neighbours=1) == (1.0, 0.1)


def test_inception_score_is_1_for_one_class_and_their_number_for_all() -> None:
    certain = np.eye(4)[np.arange(40) % 4]
    assert inception_score(certain, splits=1) == pytest.approx((4.0, 0.0))
    assert inception_score(np.log(certain + 1e-12), splits=1)[0] == pytest.approx(4.0, rel=1e-6)
    assert inception_score(np.eye(4)[np.zeros(40, int)], splits=2) == pytest.approx((1.0, 0.0))


def test_too_few_clips_are_refused() -> None:
    few = np.zeros((2, 4))
    for call in (
        lambda: kernel_distance(few[:1], few),
        lambda: precision_and_recall(few, few),
        lambda: inception_score(few),
    ):
        with pytest.raises(ValueError, match="clips"):
            call()
