"""A small study: two or three systems with clips of a moving square, and votes as the page makes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogvideo.evaluation.study.design import Key
from cogvideo.evaluation.study.votes import votes_digest
from cogvideo.media.video import write_video

HOSTILE = '</script><script>document.title="owned"</script> & "x" {{CLIPS}} <img src=x onerror=alert(1)>'
PROMPTS = ("the red digit 3 moves left slowly", "一只猫在雪地里走", HOSTILE)


def numbered(prompts: Sequence[str]) -> dict[str, int]:
    """Prompts and their lines in the file that `write_systems` writes."""
    return {prompt: line for line, prompt in enumerate(prompts)}


def write_systems(folder: Path, names: Sequence[str], prompts: Sequence[str] = PROMPTS, side: int = 16) -> list[Path]:
    """A folder of numbered clips per system."""
    for shade, name in enumerate(names):
        for line in range(len(prompts)):
            frames = np.full((4, side, side, 3), 40 * shade, np.uint8)
            for step in range(4):
                frames[step, line : line + 4, step : step + 4] = 255
            write_video(folder / name / f"{line:04d}.mp4", frames, 4)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def votes_file(key: Key, rater: str, answers: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Answers (quality, relevance, motion) to the first comparisons, as the page downloads them."""
    votes = [
        {
            "trial": trial["id"],
            "swapped": bool(number % 2),
            "quality": quality,
            "relevance": relevance,
            "motion": motion,
            "milliseconds": 1000 + number,
        }
        for number, (trial, (quality, relevance, motion)) in enumerate(zip(key["trials"], answers, strict=False))
    ]
    file = {"format": "cogvideo-votes", "version": 1, "study": key["digest"], "rater": rater, "votes": votes}
    return {**file, "digest": votes_digest(file)}  # type: ignore[typeddict-item]


def write_votes(path: Path, file: dict[str, Any]) -> Path:
    path.write_text(json.dumps(file), encoding="utf-8")
    return path
