"""Statistics of paired comparisons: Bradley-Terry strengths, and Krippendorff's alpha for agreement."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PRIOR_WINS = 0.5
"""Added to both sides of every compared pair, so that strengths stay finite if one of them always won."""
TOLERANCE, MAX_ITERATIONS = 1e-10, 10_000


def bradley_terry(wins: NDArray[np.float64], prior: float = PRIOR_WINS) -> NDArray[np.float64]:
    """Strengths (systems,) with mean 0: i is preferred to j with probability 1 / (1 + exp(s_j - s_i)).

    `wins[i, j]`: how often i was preferred to j; a tie is half a win for both. `prior` is added to both directions of
    each pair that was compared. Source: Hunter (2004), "MM algorithms for generalized Bradley-Terry models".
    Raises: ValueError if the comparisons do not connect all systems.
    """
    games = wins + wins.T
    connected = np.linalg.matrix_power((games > 0) + np.eye(len(wins)), len(wins)) > 0
    if not connected.all():
        raise ValueError("the votes do not connect all systems; strengths need more comparisons")
    wins = wins + prior * (games > 0)
    games = wins + wins.T
    total = wins.sum(1)
    strength: NDArray[np.float64] = np.ones(len(wins))
    for _ in range(MAX_ITERATIONS):
        updated = total / (games / (strength[:, None] + strength)).sum(1)
        updated /= np.exp(np.log(updated).mean())
        change = np.abs(np.log(updated / strength)).max()
        strength = updated
        if change < TOLERANCE:
            break
    logs: NDArray[np.float64] = np.log(strength)
    return logs


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float:
    """Agreement between raters: 1 if perfect, 0 at chance level; nan if all values are equal or no unit has two values.

    `units`: for each rated item, its values from any number of raters. The disagreement of two values is the square of
    their difference (interval data).
    Source: Krippendorff (2011), "Computing Krippendorff's alpha-reliability".
    """
    rated = [np.asarray(values, np.float64) for values in units if len(values) > 1]
    if not rated:
        return math.nan

    def disagreement(values: NDArray[np.float64]) -> float:
        """Sum over all ordered pairs of values."""
        return float(((values[:, None] - values) ** 2).sum())

    pooled = np.concatenate(rated)
    observed = sum(disagreement(values) / (len(values) - 1) for values in rated) / len(pooled)
    levels, counts = np.unique(pooled, return_counts=True)
    weights = (levels[:, None] - levels) ** 2
    expected = float((weights * np.outer(counts, counts)).sum()) / (len(pooled) * (len(pooled) - 1))
    return 1 - observed / expected if expected else math.nan
