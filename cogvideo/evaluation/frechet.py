"""The Fréchet distance between two sets of features, computed without a matrix square root; FVD and FID use it.

    FD = |mean_x - mean_y|^2 + |X|^2 + |Y|^2 - 2 |X Y^T|_nuclear

X and Y are the centred features over sqrt(n) or sqrt(n - 1). Everything is float64. A set is stored as its triangular
factor R, X^T X = R^T R: exact to rounding, bounded in size, and mergeable. The distance is never negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Divisor = Literal["n", "n-1"]
BLOCK = 4096
"""Rows of features converted to float64 at once."""
MIN_TO_EXTRAPOLATE = 64
"""Clips; with fewer, the distance is far from linear in 1 / n."""
SIZES_TO_EXTRAPOLATE = (1.0, 0.75, 0.5, 0.35, 0.25)
"""Fractions of the features at which the distance is measured for the extrapolation."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of feature vectors: all that a Fréchet distance needs."""

    count: int
    mean: NDArray[np.float64]
    """(d,)"""
    factor: NDArray[np.float64]
    """(at most d, d); factor.T @ factor is the sum of outer products of the centred features."""

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """features: (n, d). Raises: ValueError for another shape, no rows, or a value that is not finite."""
        parts = list(_blocks(np.asarray(features)))
        moments = cls._of_block(parts[0])
        for part in parts[1:]:
            moments = moments.merge(cls._of_block(part))
        return moments

    @classmethod
    def _of_block(cls, features: NDArray[Any]) -> Moments:
        values = checked_features(features)
        mean = values.mean(axis=0)
        return cls(len(values), mean, _triangle(values - mean))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together. Raises: ValueError for features of another width."""
        _check_widths(len(self.mean), len(other.mean))
        count = self.count + other.count
        step = other.mean - self.mean
        between = math.sqrt(self.count * other.count / count) * step
        mean = self.mean + step * (other.count / count)
        return Moments(count, mean, _triangle(np.concatenate([self.factor, other.factor, between[None]])))

    def scaled_factor(self, divisor: Divisor) -> NDArray[np.float64]:
        """A factor of the covariance matrix. Raises: ValueError if there are too few features for one."""
        if self.count < 2:
            raise ValueError("a Fréchet distance of one clip has no meaning; give 2 or more clips")
        return self.factor / math.sqrt(self.count if divisor == "n" else self.count - 1)


def frechet_distance(x: Moments, y: Moments, divisor: Divisor = "n-1") -> float:
    """The squared 2-Wasserstein distance between Gaussians with the sets' means and covariances.

    Raises: ValueError for fewer than two features in a set, or features of different widths.
    """
    _check_widths(len(x.mean), len(y.mean))
    left, right = x.scaled_factor(divisor), y.scaled_factor(divisor)
    means = float(np.sum((x.mean - y.mean) ** 2))
    # |X|^2 + |Y|^2 - 2 |X Y^T|_nuclear >= 0, since it is the least |X - Q Y|^2 over all orthogonal Q.
    nuclear = float(np.linalg.svd(left @ right.T, compute_uv=False).sum())
    return means + max(0.0, float((left**2).sum()) + float((right**2).sum()) - 2 * nuclear)


def extrapolate(
    x: NDArray[np.float32], y: NDArray[np.float32], divisor: Divisor = "n-1", seed: int = 0
) -> tuple[float, list[tuple[int, float]]]:
    """The distance at infinitely many clips, from a line fitted over 1 / n, and the (n, distance) points of the fit.

    x, y: (n, d) features of the same number of clips. Source: Chong & Forsyth 2020, "Effectively unbiased FID".
    Raises: ValueError for fewer than 64 clips.
    """
    count = min(len(x), len(y))
    if count < MIN_TO_EXTRAPOLATE:
        raise ValueError(f"{count} clips are too few to extrapolate from; give {MIN_TO_EXTRAPOLATE} or more")
    rng = np.random.default_rng(seed)
    points = []
    for part in SIZES_TO_EXTRAPOLATE:
        size = round(part * count)
        repeats = 1 if part == 1.0 else 3
        draws = [(rng.permutation(len(x))[:size], rng.permutation(len(y))[:size]) for _ in range(repeats)]
        values = [frechet_distance(Moments.of(x[left]), Moments.of(y[right]), divisor) for left, right in draws]
        points.append((size, float(np.mean(values))))
    sizes, distances = np.array(points).T
    return float(np.polyfit(1 / sizes, distances, 1)[1]), points


def checked_features(features: ArrayLike) -> NDArray[np.float64]:
    """Features (n, d) in float64. Raises: ValueError for another shape, no rows, or a value that is not finite."""
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"features have the shape {list(values.shape)}; expected one row per clip")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ValueError(f"the features of clip {row} are not finite; the network or its input is wrong")
    return values


def _blocks(features: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Blocks of rows to convert to float64; empty input yields one block, so that it is refused."""
    for first in range(0, max(1, len(features) if features.ndim else 0), BLOCK):
        yield features[first : first + BLOCK] if features.ndim else features


def _triangle(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """R of the QR decomposition if it is smaller than the rows, else the rows."""
    if len(rows) <= rows.shape[1]:
        return rows
    triangle: NDArray[np.float64] = np.asarray(np.linalg.qr(rows, mode="r"))
    return triangle


def _check_widths(left: int, right: int) -> None:
    if left != right:
        raise ValueError(f"features of {left} and {right} values cannot be compared; use the same network for both")
