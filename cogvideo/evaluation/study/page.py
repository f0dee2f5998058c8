"""The page of a study, from the template next to this file. Captions enter it as data, never as markup or code."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from cogvideo.files import atomic_write

TEMPLATE = "page.html"


@dataclass(frozen=True)
class Pair:
    """A comparison as shown to raters."""

    id: str
    prompt: str
    clips: tuple[str, str]
    """Random names."""


def write_page(
    path: Path,
    *,
    title: str,
    study: str,
    pairs: Sequence[Pair],
    clips: Sequence[Path],
    embed: bool,
    per_rater: int | None = None,
) -> None:
    """Write the page of the study with the digest `study`. `per_rater`: how many pairs a rater gets; None: all.

    `clips` are .mp4 files named as in the pairs; without `embed` the page loads them from videos/ next to it.
    """
    data = {
        "study": study,
        "perRater": per_rater,
        "trials": [{"id": pair.id, "prompt": pair.prompt, "clips": pair.clips} for pair in pairs],
    }
    videos = "\n".join(map(_embedded, sorted(clips))) if embed else ""
    template = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {"TITLE": escape(title), "SCRIPT-HASH": script_hash, "DATA": script_json(data), "CLIPS": videos}
    with atomic_write(path) as temporary:
        # in one pass, since a caption may itself contain {{CLIPS}}
        temporary.write_text(re.sub(r"\{\{([A-Z-]+)\}\}", lambda found: values[found[1]], template), encoding="utf-8")


def script_json(value: object) -> str:
    """JSON for use inside a script element, escaped so that no string in it can end the element."""
    text = json.dumps(value, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _embedded(clip: Path) -> str:
    """A clip as an element that browsers neither show nor run."""
    return f'<script type="text/plain" id="clip-{clip.stem}">{base64.b64encode(clip.read_bytes()).decode()}</script>'
