"""Measures of network outputs besides the Fréchet distance: kernel distance, precision and recall, Inception Score."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogvideo.evaluation.frechet import checked_features

BLOCK = 1024
"""Rows compared with all others at once; bounds memory."""


def kernel_distance(x: ArrayLike, y: ArrayLike) -> float:
    """The unbiased squared MMD with the kernel (x.y / d + 1)^3: KVD, and KID without its subsets.

    x, y: (n, d) features. It can be negative for similar sets. Raises: ValueError for fewer than two rows.
    """
    left, right = checked_features(x), checked_features(y)
    if len(left) < 2 or len(right) < 2:
        raise ValueError("a kernel distance needs 2 or more clips on each side")
    within = sum(
        (_kernel_sum(rows, rows) - float(_kernel((rows * rows).sum(axis=1), rows.shape[1]).sum()))
        / (len(rows) * (len(rows) - 1))
        for rows in (left, right)
    )
    return within - 2 * _kernel_sum(left, right) / (len(left) * len(right))


def precision_and_recall(real: ArrayLike, generated: ArrayLike, neighbours: int = 3) -> tuple[float, float]:
    """Shares of generated features inside the real manifold (precision) and of real ones inside the generated one.

    A manifold is the union of balls around the features, each reaching to its k-th nearest neighbour.
    Source: Kynkäänniemi et al. 2019. Raises: ValueError unless each side has more rows than `neighbours`.
    """
    x, y = checked_features(real), checked_features(generated)
    if min(len(x), len(y)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} clips on each side")
    return _covered(x, y, neighbours), _covered(y, x, neighbours)


def inception_score(outputs: ArrayLike, splits: int = 10, seed: int | None = None) -> tuple[float, float]:
    """exp of the mean KL divergence of each clip's class probabilities from their mean: mean and std over splits.

    outputs: (n, classes) logits, or probabilities, recognised by non-negative rows that sum to 1. `seed`
    shuffles the clips first. Raises: ValueError for fewer clips than splits.
    """
    values = checked_features(outputs)
    if len(values) < splits:
        raise ValueError(f"{len(values)} clips cannot be split into {splits} parts")
    if (values < 0).any() or not np.allclose(values.sum(axis=1), 1, atol=1e-4):
        values = np.exp(values - values.max(axis=1, keepdims=True))
        values /= values.sum(axis=1, keepdims=True)
    if seed is not None:
        values = values[np.random.RandomState(seed).permutation(len(values))]
    scores = [_score(part) for part in np.array_split(values, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(probabilities: NDArray[np.float64]) -> float:
    mean = probabilities.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(probabilities > 0, probabilities * np.log(probabilities / mean), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))


def _kernel(products: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    return (products / width + 1) ** 3


def _kernel_sum(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return sum(float(_kernel(x[rows] @ y.T, x.shape[1]).sum()) for rows in _blocks(len(x)))


def _covered(reference: NDArray[np.float64], points: NDArray[np.float64], neighbours: int) -> float:
    """The share of points inside the ball of at least one reference point."""
    radii = np.concatenate(
        [
            np.partition(_squared_distances(reference[rows], reference), neighbours, axis=1)[:, neighbours]
            for rows in _blocks(len(reference))
        ]
    )
    inside = [(_squared_distances(points[rows], reference) <= radii).any(axis=1) for rows in _blocks(len(points))]
    return float(np.concatenate(inside).mean())


def _squared_distances(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * (x @ y.T)
    return np.maximum(squares, 0.0)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, BLOCK):
        yield slice(start, start + BLOCK)
