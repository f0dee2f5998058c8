"""Reading raters' votes, which come back as files from strangers: everything that can be checked is checked.

Refused are votes from another study, files that are damaged or were edited by hand, answers and comparisons that are
not in the study, a comparison answered twice, and a rater counted twice. Raters who answer at random, or who compute a
new digest for made-up answers, cannot be detected. Neither can favour a system on purpose without recognising its
clips, since the page does not say which system made which.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from cogvideo.evaluation.study.design import Key
from cogvideo.files import read_json

MAX_VOTES_BYTES = 64 << 20
Answer = Literal["first", "second", "tie"]


class Vote(TypedDict):
    """One rater's answers to one comparison: which of its two clips is better."""

    trial: str
    swapped: bool
    """Whether the first clip was on the right."""
    quality: Answer
    relevance: Answer
    motion: Answer
    milliseconds: Annotated[int, Ge(0), Le(2**53)]


class VotesFile(TypedDict):
    """The file that raters download from the page."""

    format: Literal["cogvideo-votes"]
    version: Literal[1]
    study: str
    rater: str
    votes: list[Vote]
    digest: str


@dataclass(frozen=True)
class Rating:
    """A rater's answers to one comparison, with its prompt and systems from the key."""

    rater: str
    trial: str
    prompt: int
    first: int
    second: int
    vote: Vote

    def left_answers(self) -> Iterator[bool]:
        """For each answer that is not a tie: whether it was for the clip on the left."""
        for answer in (self.vote["quality"], self.vote["relevance"], self.vote["motion"]):
            if answer != "tie":
                yield (answer == "first") != self.vote["swapped"]


def votes_digest(file: VotesFile) -> str:
    """The hex SHA-256 of the votes, as the page computes it."""
    lines = [
        f"{vote['trial']} {str(vote['swapped']).lower()} {vote['quality']} {vote['relevance']} {vote['motion']} "
        f"{vote['milliseconds']}"
        for vote in file["votes"]
    ]
    return hashlib.sha256("\n".join([file["study"], file["rater"], *lines]).encode()).hexdigest()


def read_votes(paths: Sequence[Path], key: Key) -> list[Rating]:
    """Read the votes of a study. Raises: OSError; ValueError naming the file that cannot be used, and why."""
    trials = {trial["id"]: trial for trial in key["trials"]}
    ratings: list[Rating] = []
    raters: dict[str, Path] = {}
    for path in paths:
        file: VotesFile = read_json(path, VotesFile, max_bytes=MAX_VOTES_BYTES)
        rater = file["rater"]
        if file["study"] != key["digest"]:
            raise ValueError(f"{path} holds votes from a different study; give the key.json of that study")
        if not re.fullmatch("[0-9a-f]{16}", rater):
            raise ValueError(f"{path} is damaged: its rater is not one that the page makes; ask for the file again")
        if votes_digest(file) != file["digest"]:
            raise ValueError(f"{path} was changed after it was downloaded: its digest differs; ask for the original")
        if rater in raters:
            raise ValueError(f"{path} and {raters[rater]} are from the same rater; give only the later one")
        raters[rater] = path
        seen: set[str] = set()
        for vote in file["votes"]:
            if vote["trial"] not in trials:
                raise ValueError(f"{path} answers a comparison that the study does not have; ask for the file again")
            if vote["trial"] in seen:
                raise ValueError(f"{path} answers comparison {vote['trial']} twice; ask for the file again")
            seen.add(vote["trial"])
            trial = trials[vote["trial"]]
            ratings.append(Rating(rater, trial["id"], trial["prompt"], trial["first"], trial["second"], vote))
    if not ratings:
        raise ValueError("the votes hold no answers; a vote counts once all three questions of a pair are answered")
    return ratings
