"""How sure a figure is: a proportion's interval and a mean's standard error. Nothing here knows what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Proportion:
    """`right` of `total` trials, with Wilson's 95 % interval (which stays inside [0, 1] and is honest at 0 and 1)."""

    right: int
    total: int

    @property
    def value(self) -> float:
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927), z = 1.96."""
        if not self.total:
            return math.nan, math.nan
        z2 = 1.96**2
        centre = (self.right + z2 / 2) / (self.total + z2)
        half = 1.96 * math.sqrt(self.total * self.value * (1 - self.value) + z2 / 4) / (self.total + z2)
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_json(self) -> dict[str, float | int | list[float | None] | None]:
        interval = [_number(end) for end in self.interval]
        return {"value": _number(self.value), "right": self.right, "total": self.total, "interval95": interval}


@dataclass(frozen=True)
class Mean:
    """A mean over `total` clips and its standard error; the clip is the unit, since its frames are not independent."""

    value: float
    standard_error: float
    total: int

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        """values (clips,), any unit."""
        values = np.asarray(values, dtype=np.float64)
        if not values.size:
            return cls(math.nan, math.nan, 0)
        error = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
        return cls(float(values.mean()), error, int(values.size))

    def to_json(self) -> dict[str, float | int | None]:
        return {
            "value": _number(self.value),
            "standard_error": _number(self.standard_error),
            "total": self.total,
        }


def _number(value: float) -> float | None:
    """None for what is not known: JSON has no NaN."""
    return value if math.isfinite(value) else None


def proportion(right: np.ndarray) -> Proportion:
    """right (trials,) bool."""
    return Proportion(int(np.count_nonzero(right)), int(np.size(right)))
