"""The Fréchet distance against Gaussians with known moments, its merging, and its extrapolation."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cogvideo.evaluation import frechet
from cogvideo.evaluation.frechet import Moments, extrapolate, frechet_distance


def exact_samples(count: int, deviations: NDArray[np.float64], mean: float, divisor: int) -> NDArray[np.float64]:
    """Samples whose mean and covariance are exactly the given ones."""
    raw = np.random.default_rng(count + divisor).normal(size=(count, len(deviations)))
    basis = np.linalg.qr(raw - raw.mean(axis=0))[0]  # orthogonal to the constant column too
    return basis * np.sqrt(divisor) * deviations + mean


@pytest.mark.parametrize(("divisor", "shift"), [("n", 0), ("n-1", 1)])
def test_distance_of_gaussians_is_the_analytic_one(divisor, shift: int) -> None:
    ascending = np.linspace(0.5, 2, 400)
    x = exact_samples(1000, ascending, 0.0, 1000 - shift)
    y = exact_samples(900, ascending[::-1].copy(), 0.1, 900 - shift)
    # Diagonal covariances: the sum of squared differences of means and of standard deviations.
    assert 400 * 0.1**2 + ((ascending - ascending[::-1]) ** 2).sum() == pytest.approx(305.5037593985, abs=1e-9)
    assert frechet_distance(Moments.of(x), Moments.of(y), divisor) == pytest.approx(305.5037593985, abs=1e-9)


@pytest.mark.parametrize("count", [2, 16, 500])
def test_a_set_against_itself_is_zero_and_never_negative(count: int) -> None:
    x = np.random.default_rng(0).normal(size=(count, 400)).astype(np.float32)
    assert 0 <= frechet_distance(Moments.of(x), Moments.of(x[::-1])) < 1e-9


def test_few_samples_in_many_dimensions_agree_with_the_matrix_root() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(8, 30)), rng.normal(1, 2, size=(12, 30))
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov_x @ cov_y).real, 0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * root
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-6)


def test_merged_parts_equal_the_whole() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(1e4, 1, size=(300, 20)), rng.normal(1e4, 1, size=(100, 20))
    merged = Moments.of(x[:1]).merge(Moments.of(x[1:40])).merge(Moments.of(x[40:]))
    whole = Moments.of(x)
    assert merged.count == 300 and merged.factor.shape == (20, 20)
    np.testing.assert_allclose(merged.factor.T @ merged.factor, whole.factor.T @ whole.factor, rtol=1e-8, atol=1e-6)
    other = Moments.of(y)
    assert frechet_distance(merged, other) == pytest.approx(frechet_distance(whole, other), abs=1e-9)


def test_the_bias_of_few_clips_is_extrapolated_away() -> None:
    rng = np.random.default_rng(2)
    x, y = (rng.normal(size=(2000, 16)).astype(np.float32) for _ in range(2))
    limit, points = extrapolate(x, y)
    assert [n for n, _ in points] == [2000, 1500, 1000, 700, 500]
    assert points[0][1] < points[-1][1] and abs(limit) < points[0][1] / 2


@pytest.mark.parametrize(
    ("features", "message"),
    [(np.zeros(3), "one row per clip"), (np.zeros((0, 4)), "one row per clip"), ([[1.0], [np.nan]], "clip 1")],
)
def test_bad_features_are_refused(features, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moments.of(features)


def test_one_clip_and_other_widths_are_refused() -> None:
    one, wide = Moments.of(np.zeros((1, 4))), Moments.of(np.zeros((5, 5)))
    with pytest.raises(ValueError, match="2 or more"):
        frechet_distance(one, Moments.of(np.zeros((4, 4))))
    with pytest.raises(ValueError, match="same network"):
        one.merge(wide)
    with pytest.raises(ValueError, match="64 or more"):
        extrapolate(np.zeros((63, 4), np.float32), np.zeros((63, 4), np.float32))


def test_moments_of_many_clips_are_gathered_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    whole = Moments.of(x)
    monkeypatch.setattr(frechet, "BLOCK", 16)
    blocks = Moments.of(x)
    assert blocks.count == 50 and frechet_distance(whole, blocks) < 1e-12
    assert np.allclose(blocks.mean, whole.mean) and blocks.factor.shape == (6, 6)
