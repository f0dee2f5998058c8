"""Batches by position: which clips step s holds is a function of s alone, so resuming is exact and needs no state.

Positions count clips since the start of training, over all ranks: step s holds positions s * batch_size up to
(s + 1) * batch_size, of which rank r takes every world-th from r. The global batch is thus the same on any number of
ranks. Each epoch is its own keyed permutation, and every choice for a clip is drawn from (seed, stream, position).
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from cogvideo.data.dataset import ClipDataset, FrameDataset
from cogvideo.rng import data_uniforms, epoch_permutation
from cogvideo.sequence.batch import Batch
from cogvideo.sequence.prompt import PromptFormat, left_pad
from cogvideo.sequence.vocabulary import Vocabulary
from cogvideo.worlds.digits.embedded import EmbeddedClips

T = TypeVar("T")


class TextEncoder(Protocol):
    """What is wanted of a text tokenizer."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class LoaderConfig:
    """What a batch is made of."""

    task: Literal["image", "sequential", "interpolation"] = "sequential"
    """image: one frame of a clip at a time, with an image's text; else whole clips with their length in the text."""
    batch_size: int = 32
    """Clips a step, over all ranks."""
    text_len: int = 64
    """Text tokens; longer texts are cut, as published."""
    guidance_dropout: float = 0.0
    """How often the caption is replaced by the guide's, so that classifier-free guidance can be used."""
    suffix_probability: float = 1.0
    """How often a clip's caption gets the video suffix; sampling appends it where it guides."""
    balance_lengths: bool = False
    """Whether every clip length is seen equally often; else as often as it occurs."""
    seed: int = 0
    prompt: PromptFormat = field(default_factory=PromptFormat)

    def __post_init__(self) -> None:
        for name in ("guidance_dropout", "suffix_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected a probability between 0 and 1")


def batch_indices(
    step: int, rank: int, world: int, batch_size: int, dataset_len: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and positions of one rank's part of a step: two arrays of batch_size / world.

    Raises: ValueError if the global `batch_size` cannot be shared out evenly.
    """
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size={batch_size} cannot be shared by {world} ranks; choose a multiple of {world}")
    assert 0 <= rank < world and step >= 0 and dataset_len > 0
    positions = step * batch_size + np.arange(rank, batch_size, world)
    epochs, places = np.divmod(positions, dataset_len)
    rows = [
        epoch_permutation(seed, int(epoch), dataset_len)[place] for epoch, place in zip(epochs, places, strict=True)
    ]
    return np.array(rows, np.int64), positions


def balanced_rows(seconds: NDArray[np.float32]) -> NDArray[np.int64]:
    """Row numbers in which every clip length occurs as often as the commonest one; rows of rarer ones repeat."""
    groups = [np.flatnonzero(seconds == length) for length in np.unique(seconds)]
    most = max(map(len, groups))
    return np.concatenate([np.resize(group, most) for group in groups])


class ClipLoader:
    """Training batches of one rank."""

    def __init__(
        self,
        dataset: ClipDataset | EmbeddedClips,
        text_tokenizer: TextEncoder,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ):
        made, known = dataset.num_tokens, text_tokenizer.vocabulary.num_image_tokens
        if made > known:
            raise ValueError(
                f"the clips use {made} image tokens, the text tokenizer leaves ids for {known}; "
                "give the text tokenizer that was made for this image tokenizer"
            )
        self.dataset, self.tokenizer, self.config = dataset, text_tokenizer, config
        self.rank, self.world = rank, world
        self._rows = balanced_rows(dataset.seconds) if config.balance_lengths else None
        self._num_rows = len(dataset) if self._rows is None else len(self._rows)
        self._encode = lru_cache(maxsize=1 << 16)(text_tokenizer.encode)  # captions repeat

    def batch(self, step: int) -> Batch:
        """This rank's clips of a step. Shapes: text (B, text_len), frames (B, num_frames or 1, frame_len)."""
        config = self.config
        picked, positions = batch_indices(step, self.rank, self.world, config.batch_size, self._num_rows, config.seed)
        rows = picked if self._rows is None else self._rows[picked]
        frames = self.dataset.frames(rows)
        lengths_and_captions = self.dataset.texts(rows)
        dropped = data_uniforms(config.seed, "dropout", positions) < config.guidance_dropout
        if config.task == "image":
            chosen = (data_uniforms(config.seed, "frame", positions) * frames.shape[1]).astype(int)
            frames = frames[np.arange(len(rows)), chosen][:, None]
            captions = [caption for _, caption in lengths_and_captions]
            texts = [self._image_text(caption, drop) for caption, drop in zip(captions, dropped, strict=True)]
        else:
            suffixed = data_uniforms(config.seed, "suffix", positions) < config.suffix_probability
            texts = [
                self._clip_text(seconds, caption, drop, suffix)
                for (seconds, caption), drop, suffix in zip(lengths_and_captions, dropped, suffixed, strict=True)
            ]
        text, mask = left_pad([ids[: config.text_len] for ids in texts], config.text_len, self.tokenizer.vocabulary.pad)
        seconds = torch.tensor([seconds for seconds, _ in lengths_and_captions], dtype=torch.float32)
        return Batch(torch.from_numpy(text), torch.from_numpy(mask), torch.from_numpy(frames), seconds)

    def batches(self, first_step: int = 0, ahead: int = 2) -> Iterator[Batch]:
        """Batches from `first_step` on, without end, made `ahead` of use in a thread (0: made when asked for)."""
        return prefetch(self.batch, first_step, ahead)

    def _image_text(self, caption: str, drop: bool) -> list[int]:
        prompt = self.config.prompt
        return prompt.image_text(self._encode, prompt.unconditional if drop else caption, UNCUT)

    def _clip_text(self, seconds: float, caption: str, drop: bool, suffix: bool) -> list[int]:
        prompt, newline = self.config.prompt, self.tokenizer.vocabulary.newline
        if drop:
            return prompt.unconditional_text(self._encode, newline, seconds, UNCUT)
        ending = prompt.video_suffix if suffix else ""
        return prompt.clip_text(self._encode, newline, seconds, caption, UNCUT, suffix=ending)


UNCUT = 1 << 30  # training cuts long texts itself, where sampling refuses them


class FrameLoader:
    """Batches of single frames, (B, 3, H, W) float in [0, 1], for the image tokenizer's training."""

    def __init__(self, dataset: FrameDataset, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1):
        self.dataset, self.batch_size, self.seed, self.rank, self.world = dataset, batch_size, seed, rank, world

    def batch(self, step: int) -> torch.Tensor:
        """This rank's frames of a step."""
        rows, _ = batch_indices(step, self.rank, self.world, self.batch_size, len(self.dataset), self.seed)
        return rearrange(torch.from_numpy(self.dataset.frames(rows)), "b h w c -> b c h w", c=3).float() / 255

    def batches(self, first_step: int = 0, ahead: int = 2) -> Iterator[torch.Tensor]:
        """As `ClipLoader.batches`."""
        return prefetch(self.batch, first_step, ahead)


def prefetch(make: Callable[[int], T], first_step: int, ahead: int) -> Iterator[T]:
    """make(first_step), make(first_step + 1), ... with up to `ahead` of them made in a background thread.

    An error in the thread is raised here, at the step that it belongs to; closing the iterator ends the thread.
    """
    if ahead <= 0:
        step = first_step
        while True:
            yield make(step)
            step += 1
    made: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: tuple[T | None, Exception | None]) -> None:
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        step = first_step
        while not stop.is_set():
            try:
                put((make(step), None))
            except Exception as error:
                return put((None, error))
            step += 1

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
