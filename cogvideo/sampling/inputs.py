"""What users bring to sampling: pictures, videos and saved tokens, all of them as image tokens of the weights in use.

Pictures and videos are scaled by their shorter edge and cut to the centre square while decoding, as `prepare` does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogvideo.media.video import probe_video, read_video
from cogvideo.tokenizers.image import ImageTokenizer

TOKENS_FILE = "tokens.safetensors"
TOKEN_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
ENCODE_BATCH = 32
SAME_RATE = 1e-6  # relative; well over the rounding of a stored length


@dataclass(frozen=True)
class Footage:
    """Frames in order of time, of one clip or of several that are equally long."""

    tokens: Tensor
    """(clips, frames, frame_len) int64."""
    seconds: float | None = None
    """From the first frame to the last; None: pictures, which have no time of their own."""
    samples: tuple[tuple[str, int], ...] = ()
    """Caption of each clip and the how-manieth of that caption it is; empty: nobody said."""

    @property
    def num_frames(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class FootageReader:
    """How files become footage for certain weights."""

    tokenizer: ImageTokenizer
    frame_side: int
    """Tokens a side of a frame."""

    def open(self, paths: Sequence[Path], fps: float | None = None) -> Footage:
        """Saved tokens (a file or a folder of results), one video (all frames, or `fps` a second), or pictures.

        Raises: ValueError, in one line, for what is none of these, or damaged, or of other weights; OSError.
        """
        if len(paths) == 1 and (path := _tokens_file(paths[0])):
            if fps is not None:
                raise ValueError(f"{path} holds tokens, whose frame rate is what it is; leave --fps out")
            return self._saved(path)
        times = [probe_video(path).seconds for path in paths]
        if len(paths) == 1 and len(times[0]) > 1:
            chosen = times[0] if fps is None else _at_rate(paths[0], times[0], fps, from_end=False)
            seconds = float(chosen[-1] - chosen[0]) if fps is None else (len(chosen) - 1) / fps
            return Footage(self._encode(paths[0], chosen), seconds)
        for path, of_file in zip(paths, times, strict=True):
            if len(of_file) > 1:
                raise ValueError(f"{path} is a video of {len(of_file)} frames; give one video, or pictures only")
        if fps is not None:
            raise ValueError("--fps is for a video; pictures are spread over `seconds=`")
        return Footage(torch.cat([self._encode(*one) for one in zip(paths, times, strict=True)], dim=1))

    def first_frame(self, path: Path) -> Footage:
        """A picture, or the first frame of a video or of saved tokens. Raises: as `open`."""
        if saved := _tokens_file(path):
            found = self._saved(saved)
            return Footage(found.tokens[:, :1], samples=found.samples)
        return Footage(self._encode(path, probe_video(path).seconds[:1]))

    def to_continue(self, path: Path, fps: float) -> Footage:
        """A video's frames at `fps` a second, ending with its last one; or saved tokens, which must have that rate.

        Raises: as `open`; ValueError if there are no frames at such a rate.
        """
        if saved := _tokens_file(path):
            found = self._saved(saved)
            rate = (found.num_frames - 1) / found.seconds if found.seconds else fps
            if abs(rate - fps) > SAME_RATE * fps:
                raise ValueError(
                    f"{path} has {rate:g} frames a second, these settings make {fps:g}; set `rounds` to suit"
                )
            return found
        times = probe_video(path).seconds
        chosen = _at_rate(path, times, fps, from_end=True)
        return Footage(self._encode(path, chosen), (len(chosen) - 1) / fps)

    def _encode(self, path: Path, times: NDArray[np.float64]) -> Tensor:
        """(1, frames, frame_len)."""
        frames, _ = read_video(path, side=self.frame_side * self.tokenizer.compress_rate, only=times)
        pixels = rearrange(torch.from_numpy(frames), "n h w c -> n c h w", c=3).float() / 255
        return self.tokenizer.encode(pixels, batch_size=ENCODE_BATCH).cpu()[None]

    def _saved(self, path: Path) -> Footage:
        try:
            with safe_open(path, "pt") as file:
                about = (file.metadata() or {}).get("samples")
                tokens, seconds = (file.get_tensor(name) for name in ("tokens", "seconds"))
        except SafetensorError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} does not hold tokens of clips ({reason}); `cogvideo sample` writes it") from None
        if tokens.ndim != 3 or tokens.dtype not in TOKEN_TYPES or not tokens.numel() or seconds.numel() != 1:
            raise ValueError(f"{path}: tokens {tokens.dtype} {tuple(tokens.shape)}, expected integers in three axes")
        frame_len, codes = self.frame_side**2, self.tokenizer.num_tokens
        if tokens.shape[2] != frame_len or not 0 <= int(tokens.min()) <= int(tokens.max()) < codes:
            raise ValueError(
                f"{path} holds frames of {tokens.shape[2]} tokens up to {int(tokens.max())}; these weights make "
                f"{frame_len} tokens below {codes}: use the weights that it was made with"
            )
        length = float(seconds)
        if not length >= 0 or (tokens.shape[1] > 1 and not 0 < length < float("inf")):
            raise ValueError(f"{path}: seconds={length}; expected the length of the clips")
        return Footage(tokens.to(torch.int64), length, _read_samples(path, about, len(tokens)))


def _tokens_file(path: Path) -> Path | None:
    """The file of saved tokens that a path means, or None if it is a picture or video."""
    if path.is_dir():
        return path / TOKENS_FILE
    return path if path.suffix == ".safetensors" else None


def _read_samples(path: Path, text: str | None, count: int) -> tuple[tuple[str, int], ...]:
    if text is None:
        return ()
    try:
        samples = tuple((entry["prompt"], entry["number"]) for entry in json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError):
        samples = ()
    if len(samples) != count or not all(type(prompt) is str and type(number) is int for prompt, number in samples):
        raise ValueError(f"{path} is damaged: it does not say what each of its {count} clips is of")
    return samples


def _at_rate(path: Path, times: NDArray[np.float64], fps: float, *, from_end: bool) -> NDArray[np.float64]:
    """The frame times nearest to every 1/fps seconds, counted from the first frame, or back from the last."""
    if not 0 < fps < float("inf"):
        raise ValueError(f"--fps {fps:g} is not a frame rate; give a number above 0")
    mean = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else fps
    too_few = f"{path} has about {mean:.3g} frames a second, fewer than the {fps:g} that are asked for"
    count = (times[-1] - times[0]) * fps + 1e-6
    if count > len(times):
        raise ValueError(too_few)
    steps = np.arange(int(count) + 1) / fps
    wanted = times[-1] - steps[::-1] if from_end else times[0] + steps
    after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    nearest = np.where(wanted - times[before] <= times[after] - wanted, before, after)
    if len(np.unique(nearest)) < len(nearest) or np.abs(times[nearest] - wanted).max() > 0.5 / fps:
        raise ValueError(too_few)
    return times[nearest]
