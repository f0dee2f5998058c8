"""Inputs of sampling: pictures, videos and saved tokens, all read as image tokens of the weights in use.

Pictures and videos are scaled by their shorter edge and cropped to the centre square while decoding, as `prepare` does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from cogvideo.files import torch_errors_as_os_errors
from cogvideo.media.container import Limits
from cogvideo.media.video import probe_video, read_video
from cogvideo.sequence.prompt import seconds_as_given
from cogvideo.tensor_file import read_header
from cogvideo.tokenizers.image import ImageTokenizer

TOKENS_FILE = "tokens.safetensors"
TOKEN_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MAX_TOKENS = 1 << 24
"""Read at once from a file of saved tokens; 128 MiB as int64 ids."""
MAX_CLIPS = 1_000_000
"""Mapped from a file of saved tokens."""
ENCODE_BATCH = 32
INPUT_LIMITS = Limits(max_frames=200_000)
FPS_TOLERANCE = 1e-6
"""Relative; well above the rounding error of a stored length."""


@dataclass(frozen=True)
class InputClips:
    """One clip, or several of equal length."""

    tokens: Tensor
    """(clips, frames, frame_len) in order of time; int64, unless they were mapped from a file."""
    seconds: float | None = None
    """From the first frame to the last; None for pictures, which have no timing of their own."""
    samples: tuple[tuple[str, int], ...] = ()
    """Caption and sample index of each clip; empty: no captions."""

    @property
    def num_frames(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class InputReader:
    """Reads files as clips for a given set of weights."""

    tokenizer: ImageTokenizer
    frame_side: int
    """Tokens per side of a frame."""
    limits: Limits = INPUT_LIMITS
    """On pictures and videos."""
    max_tokens: int = MAX_TOKENS
    """On saved tokens: of a file that is read, of one clip of a file that is mapped."""

    def read(self, paths: Sequence[Path], fps: float | None = None) -> InputClips:
        """Read saved tokens (a file or a folder of results), one video (all frames, or `fps` per second), or pictures.

        Raises: ValueError, in one line, for files that are none of these, damaged, or of other weights; OSError.
        """
        if len(paths) == 1 and (path := _tokens_file(paths[0])):
            if fps is not None:
                raise ValueError(f"{path} holds tokens, whose frame rate cannot change; leave out --fps")
            return self._read_tokens(path)
        times = [probe_video(path, limits=self.limits).seconds for path in paths]
        if len(paths) == 1 and len(times[0]) > 1:
            chosen = times[0] if fps is None else _times_at_rate(paths[0], times[0], fps, from_end=False)
            seconds = float(chosen[-1] - chosen[0]) if fps is None else (len(chosen) - 1) / fps
            return InputClips(self._encode(paths[0], chosen), seconds)
        for path, file_times in zip(paths, times, strict=True):
            if len(file_times) > 1:
                raise ValueError(f"{path} is a video of {len(file_times)} frames; give one video, or pictures only")
        if fps is not None:
            raise ValueError("--fps needs a video; for pictures set seconds=")
        frames = [self._encode(path, file_times) for path, file_times in zip(paths, times, strict=True)]
        return InputClips(torch.cat(frames, dim=1))

    def read_first_frame(self, path: Path) -> InputClips:
        """Read a picture, or the first frame of a video or of saved tokens. Raises: as `read`."""
        if tokens_file := _tokens_file(path):
            clips = self._read_tokens(tokens_file, 1)
            return InputClips(clips.tokens, samples=clips.samples)
        return InputClips(self._encode(path, probe_video(path, limits=self.limits).seconds[:1]))

    def read_to_continue(self, path: Path, fps: float) -> InputClips:
        """Read frames of a video at `fps`, ending with its last one; or saved tokens, which must have that frame rate.

        Raises: as `read`; ValueError if the file has no frames at that rate.
        """
        if tokens_file := _tokens_file(path):
            clips = self._read_tokens(tokens_file)
            rate = (clips.num_frames - 1) / clips.seconds if clips.seconds else fps
            if abs(rate - fps) > FPS_TOLERANCE * fps:
                raise ValueError(
                    f"{path} has {rate:g} frames per second, but these settings generate {fps:g}; change "
                    "seconds= or rounds="
                )
            return clips
        chosen = _times_at_rate(path, probe_video(path, limits=self.limits).seconds, fps, from_end=True)
        return InputClips(self._encode(path, chosen), (len(chosen) - 1) / fps)

    def map_tokens(self, path: Path) -> InputClips:
        """Map saved tokens into memory: any number of clips, of which only those in use take memory.

        The tokens have the integer type of the file. Raises: as `read`.
        """
        return self._saved_tokens(path / TOKENS_FILE if path.is_dir() else path, mapped=True)

    def _encode(self, path: Path, times: NDArray[np.float64]) -> Tensor:
        """Encode the frames at these times: (1, frames, frame_len)."""
        frames, _ = read_video(
            path, side=self.frame_side * self.tokenizer.compress_rate, only=times, limits=self.limits
        )
        pixels = rearrange(torch.from_numpy(frames), "n h w c -> n c h w", c=3).float() / 255
        return self.tokenizer.encode(pixels, batch_size=ENCODE_BATCH).cpu()[None]

    def _read_tokens(self, path: Path, most: int | None = None) -> InputClips:
        """`most`: number of frames needed per clip; the others are not read."""
        clips = self._saved_tokens(path, most)
        return replace(clips, tokens=clips.tokens.to(torch.int64))

    def _saved_tokens(self, path: Path, most: int | None = None, *, mapped: bool = False) -> InputClips:
        """The tokens in the type of the file, read up to frame `most` of each clip, or mapped whole."""
        try:
            header = read_header(path)
            info, seconds_info = header["tokens"], header["seconds"]
        except (ValueError, KeyError) as error:
            reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path} ")
            raise ValueError(
                f"{path} does not hold tokens of clips ({reason}); give a file that `cogvideo sample` wrote"
            ) from None
        if len(info.shape) != 3 or info.dtype not in TOKEN_TYPES or not info.numel or seconds_info.numel != 1:
            raise ValueError(
                f"{path}: tokens are {info.dtype} of shape {info.shape}, expected a three-dimensional integer tensor"
            )
        clips, frames, frame_len = info.shape
        count = (1 if mapped else clips) * min(frames, most or frames) * frame_len
        if count > self.max_tokens:
            what, enough = ("clips of ", "thousands of frames") if mapped else ("", "hundreds of clips")
            raise ValueError(
                f"{path} holds {what}{count} tokens; expected at most {self.max_tokens}, enough for {enough}"
            )
        if clips > MAX_CLIPS:
            raise ValueError(f"{path} holds {clips} clips; expected at most {MAX_CLIPS}: split the file")
        with torch_errors_as_os_errors(), safe_open(path, "pt") as file:
            samples = (file.metadata() or {}).get("samples")
            tokens = file.get_tensor("tokens") if mapped else file.get_slice("tokens")[:, :most]
            seconds = file.get_tensor("seconds")
        codes = self.tokenizer.num_tokens
        least, largest = int(tokens.min()), int(tokens.max())
        if frame_len != self.frame_side**2 or not 0 <= least <= largest < codes:
            raise ValueError(
                f"{path} holds frames of {frame_len} tokens with ids up to {largest}; these weights "
                f"make {self.frame_side**2} tokens with ids below {codes}: use the weights that generated it"
            )
        length = seconds_as_given(seconds.float().item())
        if not length >= 0 or (tokens.shape[1] > 1 and not 0 < length < float("inf")):
            raise ValueError(f"{path}: seconds={length}; expected the length of the clips")
        return InputClips(tokens, length, _parse_samples(path, samples, clips))


def _tokens_file(path: Path) -> Path | None:
    """The file of saved tokens that a path refers to; None if it is a picture or video."""
    if path.is_dir():
        return path / TOKENS_FILE
    return path if path.suffix == ".safetensors" else None


def _parse_samples(path: Path, text: str | None, count: int) -> tuple[tuple[str, int], ...]:
    if text is None:
        return ()
    try:
        samples = tuple((entry["prompt"], entry["number"]) for entry in json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError):
        samples = ()
    if len(samples) != count or not all(type(prompt) is str and type(number) is int for prompt, number in samples):
        raise ValueError(f"{path} is damaged: its header does not list the captions of its {count} clips")
    return samples


def _times_at_rate(path: Path, times: NDArray[np.float64], fps: float, *, from_end: bool) -> NDArray[np.float64]:
    """The frame times nearest to a grid of 1/fps seconds that starts at the first frame, or ends at the last."""
    if not 0 < fps < float("inf"):
        raise ValueError(f"--fps {fps:g} is not a frame rate; give a number above 0")
    mean = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else fps
    too_few = f"{path} has about {mean:.3g} frames per second, fewer than the {fps:g} needed"
    count = (times[-1] - times[0]) * fps + 1e-6
    if count > len(times):
        raise ValueError(too_few)
    steps = np.arange(int(count) + 1) / fps
    wanted = times[-1] - steps[::-1] if from_end else times[0] + steps
    # of the two frame times around each wanted time, take the nearer one
    after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    nearest = np.where(wanted - times[before] <= times[after] - wanted, before, after)
    if len(np.unique(nearest)) < len(nearest) or np.abs(times[nearest] - wanted).max() > 0.5 / fps:
        raise ValueError(too_few)
    chosen: NDArray[np.float64] = times[nearest]
    return chosen
