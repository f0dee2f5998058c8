"""A study's design: which two clips each comparison shows. Only the key, not the page, says which system made them.

    OUT/page/study.html   for raters: captions, clips under random names, and the hash of the key
    OUT/page/videos/      the clips, if they are too large to embed in the page
    OUT/key.json          which system made which clip; stays with whoever runs the study

All clips are re-encoded in the same way, so that neither codec, file size, frame padding nor metadata gives a system
away, and every browser can play them. The look of a system's frames, including their size, is preserved.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from typing_extensions import TypedDict

from cogvideo.evaluation.sources import VIDEO_SUFFIXES
from cogvideo.evaluation.study.page import Pair, write_page
from cogvideo.files import atomic_directory, checked, read_json, write_json
from cogvideo.media.video import probe_video, stream_video, write_video
from cogvideo.sampling.outputs import SAMPLES_FILE, read_samples
from cogvideo.text import clean_text

QUESTIONS = ("quality", "relevance", "motion")
MAX_EMBEDDED_BYTES = 64 << 20
"""Clips up to this total size are embedded in the page: one file to send, from which nothing can go missing. Browsers
are slow to open much larger pages, so larger sets of clips lie next to the page."""
MAX_KEY_BYTES = 64 << 20

Index = Annotated[int, Ge(0)]


class Trial(TypedDict):
    """Two clips of one prompt, side by side."""

    id: str
    prompt: Index
    first: Index
    """The system whose clip is on the left, unless the page swaps sides."""
    second: Index


class Key(TypedDict):
    """key.json."""

    format: Literal["cogvideo-study"]
    version: Literal[1]
    secret: str
    """Random, so that the systems cannot be recovered from the key's hash by brute force."""
    title: str
    systems: list[str]
    prompts: list[str]
    trials: list[Trial]
    digest: str
    """SHA-256 of everything above; the page and every file of votes contain it."""


@dataclass(frozen=True)
class System:
    """One system's clips to compare."""

    name: str
    videos: dict[str, Path]
    """By prompt."""


def key_digest(key: Mapping[str, Any]) -> str:
    """The hex SHA-256 of a key without its own digest."""
    rest = {name: value for name, value in key.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def read_key(path: Path) -> Key:
    """Read a study's key. Raises: OSError; ValueError if the file is not a key, or was changed."""
    key: Key = read_json(path, Key, max_bytes=MAX_KEY_BYTES)
    if key_digest(key) != key["digest"]:
        raise ValueError(f"{path} was changed since the study was made; use the original")
    for trial in key["trials"]:
        if trial["prompt"] >= len(key["prompts"]) or max(trial["first"], trial["second"]) >= len(key["systems"]):
            raise ValueError(f"{path} is damaged: comparison {trial['id']} names a prompt or system that is not there")
    return key


def open_system(name: str, folder: Path, prompts: Mapping[str, int]) -> System:
    """Find a clip for each prompt in a folder; `prompts` maps each prompt to its line in the prompts file, from 0.

    A folder of `cogvideo sample` lists the prompt of each clip. In others, a clip is named after its prompt, PROMPT.mp4
    or PROMPT-0.mp4, or after the prompt's line: 12.mp4 or 0012.mp4.
    Raises: OSError; ValueError naming the first prompt without a clip.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; give the folder with the clips of {name}")
    found = _listed_videos(folder) if (folder / SAMPLES_FILE).is_file() else _named_videos(folder, prompts)
    missing = [prompt for prompt in prompts if prompt not in found]
    if missing:
        raise ValueError(
            f"{folder} has no clip for {len(missing)} of {len(prompts)} prompts, first {_short(missing[0])!r}; "
            "expected a folder of `cogvideo sample`, or clips named PROMPT.mp4, PROMPT-0.mp4 or by the prompt's line "
            "from 0, as 0000.mp4"
        )
    return System(name, {prompt: found[prompt] for prompt in prompts})


def _listed_videos(folder: Path) -> dict[str, Path]:
    """The first clip of each prompt in a folder of `cogvideo sample`."""
    found: dict[str, Path] = {}
    for sample in sorted(read_samples(folder), key=lambda sample: sample["number"]):
        video = folder / f"{sample['name']}.mp4"
        if video.is_file():
            found.setdefault(sample["prompt"], video)
    return found


def _named_videos(folder: Path, prompts: Mapping[str, int]) -> dict[str, Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES and path.name[0] != ".")
    by_stem: dict[str, Path] = {}
    for path in files:
        try:
            by_stem.setdefault(clean_text(path.stem), path)
        except ValueError:
            continue  # cannot be the name of a prompt
    numbers = {int(path.stem): path for path in reversed(files) if path.stem.isascii() and path.stem.isdecimal()}
    found = {}
    for prompt, line in prompts.items():
        video = by_stem.get(prompt) or by_stem.get(f"{prompt}-0") or numbers.get(line)
        if video is not None:
            found[prompt] = video
    return found


def make_key(title: str, systems: Sequence[str], prompts: Sequence[str]) -> Key:
    """Make a key that compares every pair of systems on every prompt, in random order and on random sides."""
    random = secrets.SystemRandom()
    trials = []
    for prompt in range(len(prompts)):
        for pair in combinations(range(len(systems)), 2):
            first, second = random.sample(pair, 2)
            trials.append(Trial(id=secrets.token_hex(8), prompt=prompt, first=first, second=second))
    random.shuffle(trials)
    key = Key(
        format="cogvideo-study",
        version=1,
        secret=secrets.token_hex(32),
        title=title,
        systems=list(systems),
        prompts=list(prompts),
        trials=trials,
        digest="",
    )
    key["digest"] = key_digest(key)
    checked(key, Key, "the key")
    return key


def make_study(
    out: Path,
    title: str,
    systems: Sequence[System],
    prompts: Sequence[str],
    *,
    per_rater: int | None = None,
    embed_up_to: int = MAX_EMBEDDED_BYTES,
    progress: Callable[[int], object] = lambda clips: None,
) -> tuple[Key, list[str]]:
    """Write a study to the new folder `out`. Returns its key, and warnings about how raters could tell systems apart.

    `per_rater`: comparisons per rater, chosen at random; None: all. `progress` counts clips.
    Raises: FileExistsError; OSError; ValueError for a clip that is not a video.
    """
    key = make_key(title, [system.name for system in systems], prompts)
    names: dict[tuple[int, int], str] = {}  # of clips, by (system, prompt)
    shapes: dict[str, set[str]] = {system.name: set() for system in systems}
    with atomic_directory(out) as folder:
        videos = folder / "page" / "videos"
        videos.mkdir(parents=True)
        for (i, system), (j, prompt) in product(enumerate(systems), enumerate(prompts)):
            names[i, j] = secrets.token_hex(8)
            shapes[system.name].add(_reencode(system.videos[prompt], videos / f"{names[i, j]}.mp4"))
            progress(1)
        clips = sorted(videos.iterdir())
        for clip in clips:
            os.utime(clip, (0, 0))  # the order of writing would give the systems away
        embed = sum(clip.stat().st_size for clip in clips) <= embed_up_to
        write_page(
            folder / "page" / "study.html",
            title=title,
            study=key["digest"],
            pairs=[
                Pair(t["id"], prompts[t["prompt"]], (names[t["first"], t["prompt"]], names[t["second"], t["prompt"]]))
                for t in key["trials"]
            ],
            clips=clips,
            embed=embed,
            per_rater=per_rater,
        )
        if embed:
            shutil.rmtree(videos)
        write_json(folder / "key.json", key)
    return key, list(_differences(shapes))


def _reencode(source: Path, target: Path) -> str:
    """Write a clip with even times, one frame in memory at a time; returns its size, frame rate and length in words.

    Raises: ValueError if `source` cannot be read.
    """
    info = probe_video(source)
    chosen, fps = even_frames(info.seconds)
    indices, counts = np.unique(chosen, return_counts=True)
    found = stream_video(source, only=info.seconds[indices], info=info)
    first, _ = next(found)
    frames = chain([first], (pixels for pixels, _ in found))
    repeated = (frame for frame, count in zip(frames, counts.tolist(), strict=True) for _ in range(count))
    write_video(target, repeated, fps)
    height, width = first.shape[:2]
    return f"{width}x{height} at {fps:.3g} frames per second, {len(chosen) / fps:.2g} s"


def even_frames(seconds: NDArray[np.float64]) -> tuple[NDArray[np.int64], float]:
    """For frames at times `seconds` (N,), the indices of those nearest to N even times; and the rate of these."""
    span = float(seconds[-1] - seconds[0])
    if len(seconds) < 2 or span <= 0:
        return np.arange(len(seconds)), 1.0
    fps = (len(seconds) - 1) / span
    middles = (seconds[1:] + seconds[:-1]) / 2
    return np.searchsorted(middles, seconds[0] + np.arange(len(seconds)) / fps), fps


def _differences(shapes: Mapping[str, set[str]]) -> Iterator[str]:
    """Warnings about clip sizes, frame rates and lengths that tell systems apart."""
    if len(set(map(frozenset, shapes.values()))) > 1:
        described = "; ".join(f"{name}: {', '.join(sorted(found)[:3])}" for name, found in shapes.items())
        yield (
            f"raters can tell the systems apart by the format of their clips ({described}); give all the same size, "
            "frame rate and length"
        )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."
