"""Which settings the page asks for, and how each is explained. Plain data; page.py makes the widgets."""

from dataclasses import dataclass
from typing import Literal

from cogvideo.sampling.config import MAX_ROUNDS, STYLES

Kind = Literal["integer", "number", "number or nothing", "choice"]


@dataclass(frozen=True)
class Setting:
    """One field of `SampleConfig`, by its dotted name. Nothing means null."""

    name: str
    label: str
    kind: Kind
    info: str | None = None
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()


MAIN = (
    Setting("seed", "Seed", "integer", "the same seed, the same clip", 0),
    Setting("seconds", "Seconds", "number", "from the first frame to the last", 0.1),
    Setting("rounds", "Rounds", "integer", "of interpolation: 5, 9, 17, 33 frames", 0, MAX_ROUNDS),
    Setting("samples_per_prompt", "Samples", "integer", "of each prompt", 1),
)

STYLE = Setting("style", "Style of the first frame", "choice", choices=tuple(STYLES))

PARTS = {"first_frame": "First frame", "key_frames": "Key frames", "interpolation": "Interpolation"}


def settings_of(part: str) -> tuple[Setting, ...]:
    """How the tokens of some frames (a key of PARTS) are drawn."""
    return (
        Setting(f"{part}.temperature", "Temperature", "number", "of clusters", 0),
        Setting(f"{part}.top_k_clusters", "Top-k clusters", "integer", "that are kept", 1),
        Setting(f"{part}.token_temperature", "Token temperature", "number", "within a cluster", 0),
        Setting(f"{part}.guidance_scale", "Guidance scale", "number or nothing", "empty: no guidance"),
        Setting(f"{part}.text_bonus", "Text bonus", "number or nothing", "in attention; empty: as published"),
    )
