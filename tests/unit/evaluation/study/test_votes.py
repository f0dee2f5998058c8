"""Votes: what can be checked of a file from a stranger is checked, and figures follow from the rest."""

from pathlib import Path

import pytest

from cogvideo.evaluation.study.design import Key, key_digest, make_key
from cogvideo.evaluation.study.results import summarise
from cogvideo.evaluation.study.votes import read_votes, votes_digest
from tests.helpers.study import votes_file, write_votes

RATER = "0123456789abcdef"
FIRST = ("first", "tie", "second")


@pytest.fixture
def key() -> Key:
    return make_key("t", ["a", "b"], ["one", "two", "three"])


def signed(file: dict) -> dict:
    """With the digest that the page would compute."""
    return {**file, "digest": votes_digest(file)}


def test_votes_are_read_with_what_the_key_says_of_them(key: Key, tmp_path: Path):
    (rating, *_) = read_votes([write_votes(tmp_path / "v.json", votes_file(key, RATER, [FIRST] * 3))], key)
    trial = key["trials"][0]
    assert (rating.first, rating.second, rating.prompt) == (trial["first"], trial["second"], trial["prompt"])
    assert rating.vote["quality"] == "first" and list(rating.left_answers()) == [True, False]


def test_edited_votes_are_refused(key: Key, tmp_path: Path):
    file = votes_file(key, RATER, [FIRST] * 3)
    for name, value in (("quality", "second"), ("swapped", True), ("milliseconds", 5)):
        edited = {**file, "votes": [{**file["votes"][0], name: value}, *file["votes"][1:]]}
        with pytest.raises(ValueError, match="was changed after it was downloaded"):
            read_votes([write_votes(tmp_path / "v.json", edited)], key)
    with pytest.raises(ValueError, match="was changed after it was downloaded"):
        read_votes([write_votes(tmp_path / "v.json", {**file, "votes": file["votes"][1:]})], key)


def test_structure_is_checked_even_with_a_right_digest(key: Key, tmp_path: Path):
    file = votes_file(key, RATER, [FIRST] * 3)
    other = votes_file(make_key("t", ["a", "b"], ["one"]), RATER, [FIRST])
    cases = {
        "a different study": other,
        "that the study does not have": signed({**file, "votes": [{**file["votes"][0], "trial": "feedfeedfeedfeed"}]}),
        "twice": signed({**file, "votes": file["votes"] + file["votes"][:1]}),
        "quality": signed({**file, "votes": [{**file["votes"][0], "quality": "left"}]}),
        "milliseconds": signed({**file, "votes": [{**file["votes"][0], "milliseconds": -1}]}),
        "its rater": signed({**file, "rater": "../../x"}),
        "format": {**file, "format": "cogvideo-study"},
        "hold no answers": signed({**file, "votes": []}),
    }
    for message, case in cases.items():
        with pytest.raises(ValueError, match=message):
            read_votes([write_votes(tmp_path / "v.json", case)], key)


def test_a_rater_counts_once(key: Key, tmp_path: Path):
    early = write_votes(tmp_path / "early.json", votes_file(key, RATER, [FIRST]))
    late = write_votes(tmp_path / "late.json", votes_file(key, RATER, [FIRST] * 3))
    with pytest.raises(ValueError, match=r"early\.json are from the same rater"):
        read_votes([early, late], key)


def test_figures_are_by_system_not_by_side(tmp_path: Path):
    """Whichever of the two is `first` in a comparison, a vote counts for its system."""
    key = make_key("t", ["a", "b"], [str(number) for number in range(40)])
    files = []
    for rater in range(3):
        for_a = ["first" if trial["first"] == 0 else "second" for trial in key["trials"]]
        for_b = ["second" if answer == "first" else "first" for answer in for_a]
        answers = [
            (a, "tie" if n % 2 else b, a if n < 30 else b) for n, (a, b) in enumerate(zip(for_a, for_b, strict=True))
        ]
        files.append(write_votes(tmp_path / f"{rater}.json", votes_file(key, f"{rater:016x}", answers)))
    results = summarise(key, read_votes(files, key))
    assert (results.raters, results.ratings, results.prompts) == (3, 120, 40)
    quality, relevance, motion = results.questions.values()
    assert quality.comparisons[0].preferred.value == 1 and quality.strengths["a"].value > 2
    assert quality.alpha == 1 and relevance.alpha == 1
    assert relevance.comparisons[0].preferred.value == 0 and relevance.comparisons[0].ties == 60
    assert motion.comparisons[0].preferred.value == 0.75
    a, b = motion.strengths["a"], motion.strengths["b"]
    assert a.value - b.value == pytest.approx(1.08, abs=0.02)  # log(90.5 / 30.5)
    assert 0 < a.low < a.value < a.high
    assert abs(results.left.value - 0.5) < 0.2
    text = results.table()
    assert "a over b" in text and "75.0 %" in text and "ties 60" in text
    assert results.to_json()["questions"]["motion"]["strengths"]["a"]["value"] == a.value


def test_one_prompt_has_strengths_without_an_interval(tmp_path: Path):
    key = make_key("t", ["a", "b"], ["one"])
    files = [
        write_votes(tmp_path / f"{rater}.json", votes_file(key, f"{rater:016x}", [("first", "tie", "second")]))
        for rater in range(4)
    ]
    results = summarise(key, read_votes(files, key))
    strength = results.questions["quality"].strengths["a"]
    assert strength.value != 0 and strength.interval is None
    assert results.to_json()["questions"]["quality"]["strengths"]["a"]["interval95"] is None
    line = next(line for line in results.table().splitlines() if "strength:" in line)
    assert "[" not in line and f"a {strength.value:+.2f}" in line


def test_one_rater_has_no_agreement(key: Key, tmp_path: Path):
    results = summarise(key, read_votes([write_votes(tmp_path / "v.json", votes_file(key, RATER, [FIRST] * 3))], key))
    assert results.questions["quality"].alpha is None and "agreement: -" in results.table()


def test_votes_that_do_not_connect_all_systems_have_win_rates_only(tmp_path: Path):
    key = make_key("t", ["a", "b", "c"], ["one"])
    results = summarise(key, read_votes([write_votes(tmp_path / "v.json", votes_file(key, RATER, [FIRST]))], key))
    assert results.questions["quality"].strengths == {} and "do not connect all systems" in results.table()
    assert sum(c.preferred.total for c in results.questions["quality"].comparisons) == 1


def test_the_digest_of_a_key_covers_all_but_itself(key: Key):
    assert key_digest(key) == key["digest"] == key_digest({**key, "digest": "x"})
    assert key_digest({**key, "trials": key["trials"][1:]}) != key["digest"]
