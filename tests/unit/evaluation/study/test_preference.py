"""Bradley-Terry strengths and Krippendorff's alpha, against closed forms and published examples."""

import math

import numpy as np
import pytest

from cogvideo.evaluation.study.preference import bradley_terry, krippendorff_alpha

# Krippendorff (2011), example C: four observers, twelve units, missing values left out
EXAMPLE = [
    [1, 1, 1],
    [2, 2, 3, 2],
    [3, 3, 3, 3],
    [3, 3, 3, 3],
    [2, 2, 2, 2],
    [1, 2, 3, 4],
    [4, 4, 4, 4],
    [1, 1, 2, 1],
    [2, 2, 2, 2],
    [5, 5, 5],
    [1, 1],
    [3],
]


def test_two_systems_have_the_log_odds_of_their_wins():
    strengths = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=0)
    assert strengths == pytest.approx([math.log(3) / 2, -math.log(3) / 2])


def test_strengths_are_found_again_from_expected_wins():
    truth = np.array([0.9, 0.1, -1.0])
    wins = 100 / (1 + np.exp(truth - truth[:, None]))
    np.fill_diagonal(wins, 0)
    assert bradley_terry(wins, prior=0) == pytest.approx(truth, abs=1e-6)


def test_strengths_of_pairs_that_never_met_follow_from_a_third():
    wins = np.array([[0.0, 20.0, 0.0], [10.0, 0.0, 20.0], [0.0, 10.0, 0.0]])
    assert bradley_terry(wins, prior=0) == pytest.approx([math.log(2), 0, -math.log(2)], abs=1e-6)


def test_a_system_that_always_wins_has_a_finite_strength():
    strengths = bradley_terry(np.array([[0.0, 20.0], [0.0, 0.0]]))
    assert strengths[0] - strengths[1] == pytest.approx(math.log(20.5 / 0.5))


def test_systems_that_nothing_connects_are_refused():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 5
    with pytest.raises(ValueError, match="do not connect"):
        bradley_terry(wins)


def test_alpha_of_the_published_example():
    assert krippendorff_alpha(EXAMPLE) == pytest.approx(0.849, abs=5e-4)


def test_alpha_is_one_if_all_agree_and_negative_if_all_differ():
    assert krippendorff_alpha([[1, 1], [0, 0], [-1, -1]]) == 1
    assert krippendorff_alpha([[1, -1], [-1, 1], [1, -1]]) < 0


def test_alpha_of_random_answers_is_near_zero():
    answers = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (2000, 3))
    assert abs(krippendorff_alpha(answers.tolist())) < 0.03


def test_alpha_is_undefined_without_overlap_or_difference():
    assert math.isnan(krippendorff_alpha([[1], [0], []]))
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1, 1]]))
