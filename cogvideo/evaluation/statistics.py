"""Uncertainty of measurements: intervals of proportions, standard errors and intervals of means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Proportion:
    """`right` of `total` trials, with Wilson's 95 % interval, which stays inside [0, 1] and is valid at 0 and 1."""

    right: int
    total: int

    @classmethod
    def from_trials(cls, right: ArrayLike) -> Proportion:
        """right: (trials,) bool."""
        return cls(int(np.count_nonzero(right)), int(np.size(right)))

    @property
    def value(self) -> float:
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Source: Wilson (1927), z = 1.96."""
        if not self.total:
            return math.nan, math.nan
        z2 = 1.96**2
        centre = (self.right + z2 / 2) / (self.total + z2)
        half = 1.96 * math.sqrt(self.total * self.value * (1 - self.value) + z2 / 4) / (self.total + z2)
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_json(self) -> dict[str, float | int | list[float | None] | None]:
        interval = [_finite_or_none(end) for end in self.interval]
        return {"value": _finite_or_none(self.value), "right": self.right, "total": self.total, "interval95": interval}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" if self.total else "-"


@dataclass(frozen=True)
class Mean:
    """A mean over `total` clips and its standard error. The clip is the unit, since its frames are not independent."""

    value: float
    standard_error: float
    total: int

    @classmethod
    def from_values(cls, values: ArrayLike) -> Mean:
        """values: (clips,) in any unit."""
        values = np.asarray(values, dtype=np.float64)
        if not values.size:
            return cls(math.nan, math.nan, 0)
        error = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
        return cls(float(values.mean()), error, int(values.size))

    def to_json(self) -> dict[str, float | int | None]:
        return {
            "value": _finite_or_none(self.value),
            "standard_error": _finite_or_none(self.standard_error),
            "total": self.total,
        }

    def __str__(self) -> str:
        if not self.total:
            return "-"
        return f"{self.value:.3f} ± {self.standard_error:.3f}" if self.total > 1 else f"{self.value:.3f}"


def bootstrap_interval(values: ArrayLike, repeats: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of the mean of per-clip values; None for fewer than two.

    For means only: the Fréchet distance of resampled clips is biased, since some of them occur twice.
    """
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = [sample[rng.integers(len(sample), size=len(sample))].mean() for _ in range(repeats)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
