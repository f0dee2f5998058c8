"""Where clips come from: folders of videos, folders of frames, results of `cogvideo sample`, tokens in memory.

Tokens and pictures are what a model produced; a video file has been through a lossy codec, which shifts every distance,
so each source records its kind. Clips are read one at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvideo.data.captions import CaptionsFile, plain_path
from cogvideo.data.readers.delimited import MEDIA_SUFFIXES
from cogvideo.media.sandbox import read_picture
from cogvideo.media.video import LIMITS, probe_video, read_video, stream_video
from cogvideo.sampling.inputs import TOKENS_FILE, InputReader
from cogvideo.sampling.outputs import SAMPLES_FILE, read_samples
from cogvideo.sampling.pipeline import decode_frames
from cogvideo.tensor_file import read_header
from cogvideo.tokenizers.image import ImageTokenizer

PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"))
VIDEO_SUFFIXES = MEDIA_SUFFIXES - PICTURE_SUFFIXES

Kind = Literal["tokens", "frames", "videos"]
Frames = NDArray[np.uint8]
Resize = Callable[[Frames], Tensor]
"""Maps frames (n, H, W, 3), each independently of the others, to (n, ...)."""


class Clip:
    """One video to take frames from."""

    name: str
    caption: str | None = None
    """The prompt that it was generated from, or a description of it, if known."""

    @property
    def num_frames(self) -> int:
        raise NotImplementedError

    @property
    def seconds(self) -> NDArray[np.float64] | None:
        """(num_frames,) times; None if unknown."""
        return None

    @property
    def identity(self) -> str:
        """Determines the clip's pixels; part of the key under which features are cached."""
        raise NotImplementedError

    def read(self, indices: NDArray[np.int64]) -> Frames:
        """The frames at these ascending indices, (n, H, W, 3). Raises: ValueError if they cannot be read."""
        raise NotImplementedError

    def resized(self, indices: NDArray[np.int64], resize: Resize) -> Tensor:
        """What `resize` makes of the frames at these ascending indices; large clips are never held at full size.

        Raises: as `read`.
        """
        return resize(self.read(indices))


@dataclass(frozen=True)
class ClipSource:
    """Clips in a fixed order."""

    origin: str
    """Name for messages and results."""
    kind: Kind
    clips: tuple[Clip, ...]

    @property
    def lossy(self) -> bool:
        return self.kind == "videos"

    def __len__(self) -> int:
        return len(self.clips)


class VideoClip(Clip):
    """A video file, probed on first use."""

    def __init__(self, path: Path, name: str, caption: str | None = None) -> None:
        self.path, self.name, self.caption = path, name, caption

    @cached_property
    def _times(self) -> NDArray[np.float64]:
        return probe_video(self.path).seconds

    @property
    def num_frames(self) -> int:
        return len(self._times)

    @property
    def seconds(self) -> NDArray[np.float64]:
        return self._times

    @property
    def identity(self) -> str:
        return _file_identity(self.path)

    def read(self, indices: NDArray[np.int64]) -> Frames:
        return read_video(self.path, only=self._times[indices])[0]

    def resized(self, indices: NDArray[np.int64], resize: Resize) -> Tensor:
        return torch.cat([resize(pixels[None]) for pixels, _ in stream_video(self.path, only=self._times[indices])])


class FrameFolderClip(Clip):
    """Pictures of equal size in a folder, sorted by name, with numbers in names compared as numbers."""

    def __init__(self, pictures: list[Path], name: str) -> None:
        self.pictures, self.name = sorted(pictures, key=_natural), name

    @property
    def num_frames(self) -> int:
        return len(self.pictures)

    @property
    def identity(self) -> str:
        return "|".join(map(_file_identity, self.pictures))

    def read(self, indices: NDArray[np.int64]) -> Frames:
        return np.stack(list(self._pictures_at(indices)))

    def resized(self, indices: NDArray[np.int64], resize: Resize) -> Tensor:
        return torch.cat([resize(frame[None]) for frame in self._pictures_at(indices)])

    def _pictures_at(self, indices: NDArray[np.int64]) -> Iterator[Frames]:
        shape = None
        for index in indices:
            frame = read_picture(self.pictures[index], LIMITS)
            shape = shape or frame.shape
            if frame.shape != shape:
                raise ValueError(
                    f"{self.pictures[index]} has {frame.shape[1]}x{frame.shape[0]} pixels, the clip's first frame "
                    f"{shape[1]}x{shape[0]}; expected one size per clip"
                )
            yield frame


class TokenClip(Clip):
    """Tokens (frames, frame_len) of any integer type, decoded when frames are read. `times` in seconds."""

    def __init__(
        self,
        tokens: Tensor,
        times: NDArray[np.float64] | None,
        tokenizer: ImageTokenizer,
        name: str,
        caption: str | None = None,
    ) -> None:
        self.tokens, self.times, self.tokenizer, self.name, self.caption = tokens, times, tokenizer, name, caption

    @property
    def num_frames(self) -> int:
        return len(self.tokens)

    @property
    def seconds(self) -> NDArray[np.float64] | None:
        return self.times

    @property
    def identity(self) -> str:
        tokens = hashlib.sha256(self.tokens.long().numpy().tobytes()).hexdigest()
        return f"{tokens} {tokenizer_digest(self.tokenizer)}"

    def read(self, indices: NDArray[np.int64]) -> Frames:
        frames: Frames = decode_frames(self.tokenizer, self.tokens[torch.from_numpy(indices)].long())
        return frames


class ReconstructedClip(Clip):
    """A clip after a round trip through an image tokenizer: the best that a model using it can achieve."""

    def __init__(self, clip: Clip, tokenizer: ImageTokenizer, prepare: Resize) -> None:
        """`prepare` maps frames to (n, 3, side, side), 0 to 255, at a size that the tokenizer accepts."""
        self._clip, self._tokenizer, self._prepare = clip, tokenizer, prepare
        self.name, self.caption = clip.name, clip.caption

    @property
    def num_frames(self) -> int:
        return self._clip.num_frames

    @property
    def seconds(self) -> NDArray[np.float64] | None:
        return self._clip.seconds

    @property
    def identity(self) -> str:
        return f"{self._clip.identity} {tokenizer_digest(self._tokenizer)}"

    def read(self, indices: NDArray[np.int64]) -> Frames:
        return self.reconstruct(indices)[0]

    def reconstruct(self, indices: NDArray[np.int64]) -> tuple[Frames, NDArray[np.int64]]:
        """The frames, and how often each code occurs in their tokens: (codes,)."""
        tokens = self._tokenizer.encode(self._clip.resized(indices, self._prepare) / 255).cpu()
        frames: Frames = decode_frames(self._tokenizer, tokens)
        return frames, np.bincount(tokens.flatten().numpy(), minlength=self._tokenizer.num_tokens)


def open_source(folder: Path, tokenizer: ImageTokenizer | None = None) -> ClipSource:
    """The clips of a folder: results of `cogvideo sample`, videos at any depth, or folders of frames.

    Links to other folders are followed, but each folder is read once.
    A .gif next to another video of the same name is taken for a copy and left out.
    With `tokenizer`, results are decoded from their tokens, else read from their lossy .mp4 files.
    Raises: OSError; ValueError for a folder with no clips, or with both videos and frames.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one of videos, of folders of frames, or of results")
    if (folder / TOKENS_FILE).is_file():
        if tokenizer is not None:
            return _tokens_of(folder, tokenizer)
        if (folder / SAMPLES_FILE).is_file():
            samples = [(sample["name"], sample["prompt"]) for sample in read_samples(folder)]
            clips = tuple(VideoClip(folder / f"{name}.mp4", name, prompt) for name, prompt in samples)
            return ClipSource(str(folder), "videos", clips)
    videos: list[tuple[Path, str]] = []
    frames: list[Clip] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # links in a loop, or two to the same folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not _is_link_into(folder, os.path.join(place, name))
        )
        paths = [Path(place) / name for name in sorted(names) if not name.startswith(".")]
        pictures = [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES]
        found = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
        stems = {path.stem for path in found if path.suffix.lower() != ".gif"}
        found = [path for path in found if path.suffix.lower() != ".gif" or path.stem not in stems]
        videos += [(path, os.path.relpath(path, folder)) for path in found]
        if pictures and not found:
            frames.append(FrameFolderClip(pictures, os.path.relpath(place, folder)))
    if videos and frames:
        raise ValueError(
            f"{folder} holds videos, such as {videos[0][1]}, and folders of frames, such as {frames[0].name}; "
            "give a folder of one kind"
        )
    if not videos and not frames:
        raise ValueError(f"{folder} holds no videos and no folders of frames")
    return ClipSource(str(folder), "frames", tuple(frames)) if frames else _videos(videos, folder)


def _is_link_into(folder: Path, path: str) -> bool:
    """Whether a path is a link to something in the folder, which is read under its own name."""
    return os.path.islink(path) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def with_captions(sources: Sequence[ClipSource], captions: CaptionsFile) -> list[ClipSource]:
    """The same clips with captions from a file that names videos by their paths in the folder.

    Clips that it does not name keep their own. If a video has several captions, the first is used.
    Raises: ValueError if the file names none of the clips.
    """
    texts: dict[str, str] = {}
    for caption in captions:
        texts.setdefault(plain_path(caption.video), caption.text)
    captioned = [replace(source, clips=tuple(copy(clip) for clip in source.clips)) for source in sources]
    clips = [clip for source in captioned for clip in source.clips]
    named = [clip for clip in clips if plain_path(clip.name) in texts]
    if clips and not named:
        raise ValueError(
            f"{captions.path} names none of the {len(clips)} clips, such as {clips[0].name!r}; its first video is "
            f"{next(iter(texts))!r}: give paths in the folder of the clips, with their endings"
        )
    for clip in named:
        clip.caption = texts[plain_path(clip.name)]
    return captioned


def clips_of_tokens(
    tokens: Tensor,
    seconds: float | None,
    names: list[str],
    tokenizer: ImageTokenizer,
    origin: str,
    captions: list[str] | None = None,
) -> ClipSource:
    """Clips from tokens (clips, frames, frame_len); each spans `seconds`."""
    times = np.linspace(0.0, seconds, tokens.shape[1]) if seconds else None
    texts: Sequence[str | None] = captions or [None] * len(names)
    clips = (
        TokenClip(clip, times, tokenizer, name, text) for clip, name, text in zip(tokens, names, texts, strict=True)
    )
    return ClipSource(origin, "tokens", tuple(clips))


def _tokens_of(folder: Path, tokenizer: ImageTokenizer) -> ClipSource:
    info = read_header(folder / TOKENS_FILE).get("tokens")  # the file determines the tokens per frame
    frame_side = round(info.shape[-1] ** 0.5) if info is not None and info.shape else 0
    found = InputReader(tokenizer, frame_side).map_tokens(folder)
    names = [f"{index:03d} {caption}" for index, (caption, _) in enumerate(found.samples)]
    names = names or [f"{index:03d}" for index in range(len(found.tokens))]
    captions = [caption for caption, _ in found.samples] or None
    return clips_of_tokens(found.tokens, found.seconds, names, tokenizer, str(folder), captions)


def _videos(videos: list[tuple[Path, str]], folder: Path) -> ClipSource:
    return ClipSource(str(folder), "videos", tuple(VideoClip(path, name) for path, name in videos))


def _natural(path: Path) -> tuple[tuple[int, str], ...]:
    """A sort key that puts frame-9.png before frame-10.png."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name))


@lru_cache(maxsize=4)
def tokenizer_digest(tokenizer: ImageTokenizer) -> str:
    """SHA-256 of an image tokenizer's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy(force=True).tobytes())
    return digest.hexdigest()


def _file_identity(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _raise(error: OSError) -> None:
    raise error
