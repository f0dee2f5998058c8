"""Results of a study's votes: how often each system was preferred, their strengths, and how far raters agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.evaluation.statistics import Proportion
from cogvideo.evaluation.study.design import QUESTIONS, Key
from cogvideo.evaluation.study.preference import bradley_terry, krippendorff_alpha
from cogvideo.evaluation.study.votes import Rating

RESAMPLES = 1000
VALUES = {"first": 1.0, "tie": 0.0, "second": -1.0}
"""For agreement: a tie lies halfway between the two preferences."""
METHOD = """Win rates leave ties out; their 95 % intervals are Wilson's, which take votes as independent. Strengths are
Bradley-Terry's, with a tie as half a win for each: s is preferred to t with probability 1 / (1 + exp(t - s)); their
95 % intervals come from 1,000 resamples of the prompts (none for a single prompt). Agreement is Krippendorff's
alpha: 1 is perfect, 0 is chance."""


@dataclass(frozen=True)
class PairResult:
    """Two systems' votes on one question."""

    first: str
    second: str
    preferred: Proportion
    """How often the first was preferred, among votes that are not ties."""
    ties: int


@dataclass(frozen=True)
class Strength:
    """A system's Bradley-Terry strength."""

    value: float
    low: float | None
    """`low` and `high`: 95 % interval over resampled prompts; None for one prompt, which resampling cannot vary."""
    high: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        return f"{self.value:+.2f}" + ("" if self.interval is None else " [{:+.2f}, {:+.2f}]".format(*self.interval))


@dataclass(frozen=True)
class Answers:
    """Results of one question."""

    comparisons: tuple[PairResult, ...]
    strengths: dict[str, Strength]
    """By system; empty if the votes do not connect all systems."""
    alpha: float | None
    """Krippendorff's alpha; None if no comparison has two raters, or all answers are the same."""


@dataclass(frozen=True)
class StudyResults:
    """Results of a study."""

    raters: int
    ratings: int
    """Answered comparisons, counted once per rater."""
    prompts: int
    left: Proportion
    """How often the clip on the left was preferred; a share far from one half suggests that raters did not look."""
    questions: dict[str, Answers]

    def to_json(self) -> dict[str, Any]:
        return {
            "raters": self.raters,
            "ratings": self.ratings,
            "prompts": self.prompts,
            "left": self.left.to_json(),
            "questions": {
                name: {
                    "comparisons": [
                        {"first": c.first, "second": c.second, "preferred": c.preferred.to_json(), "ties": c.ties}
                        for c in answers.comparisons
                    ],
                    "strengths": {
                        system: {"value": s.value, "interval95": s.interval} for system, s in answers.strengths.items()
                    },
                    "alpha": answers.alpha,
                }
                for name, answers in self.questions.items()
            },
        }

    def table(self) -> str:
        """All results as aligned text."""
        pairs = [(c.first, c.second) for c in next(iter(self.questions.values())).comparisons]
        width = max(len(f"{first} over {second}") for first, second in pairs)
        lines = [
            f"raters: {self.raters}, comparisons: {self.ratings}, prompts: {self.prompts}; "
            f"the left clip was preferred in {self.left}"
        ]
        for name, answers in self.questions.items():
            lines += ["", name]
            for c in answers.comparisons:
                wins, losses = c.preferred.right, c.preferred.total - c.preferred.right
                label = f"{c.first} over {c.second}"
                lines.append(f"  {label:<{width}}  {c.preferred!s:<22}  {wins} : {losses}, ties {c.ties}")
            strengths = sorted(answers.strengths.items(), key=lambda item: -item[1].value)
            described = ", ".join(f"{system} {strength}" for system, strength in strengths)
            alpha = "-" if answers.alpha is None else f"{answers.alpha:.2f}"
            lines += [f"  strength: {described or '-, the votes do not connect all systems'}", f"  agreement: {alpha}"]
        return "\n".join([*lines, "", METHOD])


def summarise(key: Key, ratings: Sequence[Rating]) -> StudyResults:
    """Results of all ratings of a study."""
    left = [is_left for rating in ratings for is_left in rating.left_answers()]
    return StudyResults(
        raters=len({rating.rater for rating in ratings}),
        ratings=len(ratings),
        prompts=len({rating.prompt for rating in ratings}),
        left=Proportion(sum(left), len(left)),
        questions={name: _answers(key["systems"], ratings, name) for name in QUESTIONS},
    )


def _answers(systems: Sequence[str], ratings: Sequence[Rating], question: str) -> Answers:
    outcomes = [(rating, _answer(rating, question)) for rating in ratings]
    decided = np.zeros((len(systems), len(systems)), np.int64)
    ties = np.zeros_like(decided)
    units: dict[str, list[float]] = {}
    for rating, answer in outcomes:
        units.setdefault(rating.trial, []).append(VALUES[answer])
        if answer == "tie":
            ties[rating.first, rating.second] += 1
            ties[rating.second, rating.first] += 1
        else:
            winner, loser = (rating.first, rating.second) if answer == "first" else (rating.second, rating.first)
            decided[winner, loser] += 1
    comparisons = tuple(
        PairResult(
            systems[i], systems[j], Proportion(int(decided[i, j]), int(decided[i, j] + decided[j, i])), int(ties[i, j])
        )
        for i, j in combinations(range(len(systems)), 2)
    )
    alpha = krippendorff_alpha(list(units.values()))
    return Answers(comparisons, _strengths(systems, outcomes), None if np.isnan(alpha) else alpha)


def _answer(rating: Rating, question: str) -> str:
    votes: Mapping[str, Any] = rating.vote
    return str(votes[question])


def _strengths(systems: Sequence[str], outcomes: Sequence[tuple[Rating, str]]) -> dict[str, Strength]:
    """Strengths by system; empty if the votes do not connect all systems.

    Prompts are resampled, not votes, because votes on the same clips are not independent.
    """
    prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(rating.prompt for rating, _ in outcomes))}
    by_prompt: NDArray[np.float64] = np.zeros((len(prompts), len(systems), len(systems)))
    for rating, answer in outcomes:
        wins, share = by_prompt[prompts[rating.prompt]], (VALUES[answer] + 1) / 2
        wins[rating.first, rating.second] += share
        wins[rating.second, rating.first] += 1 - share
    try:
        estimate = bradley_terry(by_prompt.sum(0))
    except ValueError:
        return {}
    random = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES if len(prompts) > 1 else 0):
        wins = by_prompt[random.integers(len(by_prompt), size=len(by_prompt))].sum(0)
        try:
            resampled.append(bradley_terry(wins))
        except ValueError:
            continue  # a resample that does not connect all systems
    if not resampled:
        return {name: Strength(float(value), None, None) for name, value in zip(systems, estimate, strict=True)}
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    return {name: Strength(float(estimate[i]), float(low[i]), float(high[i])) for i, name in enumerate(systems)}
