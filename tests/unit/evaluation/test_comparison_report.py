"""Results files of the benchmarks side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from cogvideo.evaluation.comparison_report import format_files
from cogvideo.evaluation.statistics import Mean, Proportion


def write(path: Path, hash: str = "0a1b", **sources: Any) -> Path:
    path.write_text(json.dumps({"protocol": {"hash": hash, "name": "digits"}, **sources}), encoding="utf-8")
    return path


def figures(right: int, step: float) -> dict[str, Any]:
    """One set of a benchmark's results, as `Summary.to_json` gives it."""
    return {
        "4 s": {
            "digit": Proportion(right, 10).to_json(),
            "step_px_by_speed": {"slowly": Mean(step, 0.1, 10).to_json()},
            "midpoint_px": None,
            "midpoint_px_by_round": [],
            "gravity": Mean.from_values([]).to_json(),
        }
    }


def test_two_results_of_a_benchmark_side_by_side(tmp_path: Path) -> None:
    left = write(tmp_path / "a.json", generated=figures(9, 1.5), original=figures(10, 2.0))
    right = write(tmp_path / "b.json", generated=figures(4, 1.25), original=figures(10, 2.0))
    header, digit, step = (line.split("  ") for line in format_files(left, right).splitlines())
    assert header[0] == "generated clips"
    assert [cell.strip() for cell in digit if cell] == [
        "4 s: digit",
        str(Proportion(9, 10)),
        str(Proportion(4, 10)),
        "0a1b",
    ]
    assert [cell.strip() for cell in step if cell] == [
        "4 s: step px by speed, slowly",
        "1.500 ± 0.100",
        "1.250 ± 0.100",
        "0a1b",
    ]


def test_clips_that_both_results_have_are_compared(tmp_path: Path) -> None:
    left = write(tmp_path / "a.json", reconstructed=figures(9, 1.5), original=figures(10, 2.0))
    right = write(tmp_path / "b.json", generated=figures(4, 1.25), reconstructed=figures(8, 1.0))
    assert format_files(left, right).startswith("reconstructed clips")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"hash": "ffff", "generated": figures(9, 1.5)}, "cannot be compared"),
        ({"original": figures(9, 1.5)}, "no clips of the same source"),
        (
            {"generated": {"4 s": {"digit": {"right": 11, "total": 10}}}},
            "b.json: digit is right 11 of 10 times; expected at most 10",
        ),
        ({"generated": {"4 s": {"digit": {"right": -1, "total": 2}}}}, "b.json"),
        ({"generated": {"4 s": []}}, "b.json"),
        ({"numbers": {}, "generated": {}}, "b.json does not hold results of a benchmark"),
    ],
)
def test_results_that_cannot_be_compared(sources: dict[str, Any], message: str, tmp_path: Path) -> None:
    left = write(tmp_path / "a.json", generated=figures(9, 1.5))
    with pytest.raises(ValueError, match=message):
        format_files(left, write(tmp_path / "b.json", **sources))
