"""Training batches by position: the content of step s is a function of s alone, so resuming is exact without state.

A position counts training samples from the start, over all ranks: step s holds positions s * batch_size up to
(s + 1) * batch_size, and rank r takes every world_size-th of them, starting at r. So the global batch is the same on
any number of ranks. Each epoch has its own keyed permutation; every random choice is keyed by (seed, stream, position).
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from cogvideo.data.dataset import ClipDataset, FrameDataset, InMemoryClips, PairDataset
from cogvideo.data.mixing import Mixture
from cogvideo.rng import data_uniforms, epoch_permutation
from cogvideo.sequence.batch import Batch
from cogvideo.sequence.layout import Vocabulary
from cogvideo.sequence.prompt import NO_LIMIT, PromptFormat, left_pad
from cogvideo.superres.batch import SuperresBatch, pad_captions
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.text import LANGUAGES, language, normalise

T = TypeVar("T")

CACHED_TEXTS = 1 << 16
"""Number of encoded texts to cache, since captions repeat."""


class TextEncoder(Protocol):
    """The part of a text tokenizer that loaders use."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class LoaderConfig:
    """What a batch of clips is made of."""

    task: Literal["image", "sequential", "interpolation"] = "sequential"
    """image: one frame of each clip, with the text of a single image; otherwise whole clips, with their length in the
    text."""
    batch_size: int = 32
    """Clips per step, over all ranks."""
    text_len: int = 64
    """Text tokens; longer texts are truncated, as published."""
    guidance_dropout: float = 0.0
    """Probability that the unconditional prompt replaces a caption, as classifier-free guidance needs."""
    suffix_probability: float = 1.0
    """Probability that a clip's caption gets the video suffix, which guided sampling appends."""
    balance_lengths: bool = False
    """Use every clip length equally often, instead of as often as it occurs."""
    seed: int = 0
    prompt: PromptFormat = field(default_factory=PromptFormat)
    weights: Sequence[float] | None = None
    """Relative frequencies of clips from each of the dataset's folders; null: proportional to their row counts."""
    loss_by: Sequence[Literal["source", "language"]] = ()
    """The columns of `Batch.loss_groups`: `source`, the index of the clip's folder; `language`, that of the caption's
    language in LANGUAGES."""

    def __post_init__(self) -> None:
        for name in ("guidance_dropout", "suffix_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected a probability between 0 and 1")


def batch_indices(
    step: int, rank: int, world_size: int, batch_size: int, dataset_len: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One rank's part of a step -> dataset rows and positions, each (batch_size / world_size,).

    Raises: ValueError as `step_positions`.
    """
    assert dataset_len > 0
    positions = step_positions(step, rank, world_size, batch_size)
    epochs, offsets = np.divmod(positions, dataset_len)
    rows = [
        epoch_permutation(seed, int(epoch), dataset_len)[offset] for epoch, offset in zip(epochs, offsets, strict=True)
    ]
    return np.array(rows, np.int64), positions


def step_positions(step: int, rank: int, world_size: int, batch_size: int) -> NDArray[np.int64]:
    """The training positions of one rank's part of a step: (batch_size / world_size,).

    Raises: ValueError if the ranks cannot share the global `batch_size` evenly.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {world_size} ranks; choose a multiple of {world_size}"
        )
    assert 0 <= rank < world_size and step >= 0
    return step * batch_size + np.arange(rank, batch_size, world_size)


def balanced_rows(seconds: NDArray[np.float32]) -> NDArray[np.int64]:
    """Row numbers in which every clip length is as frequent as the commonest; rows of rarer lengths repeat."""
    groups = [np.flatnonzero(seconds == length) for length in np.unique(seconds)]
    most = max(map(len, groups))
    return np.concatenate([np.resize(group, most) for group in groups])


def mixture_of_folders(
    dataset: ClipDataset | FrameDataset | InMemoryClips | PairDataset,
    weights: Sequence[float] | None,
    seed: int,
    seconds: NDArray[np.float32] | None = None,
) -> Mixture | None:
    """A mixture of a dataset's folders; given the `seconds` of all rows, clip lengths are balanced within each folder.

    None without weights. Raises: ValueError as `Mixture`.
    """
    if weights is None:
        return None
    sources = dataset.sources(np.arange(len(dataset)))
    groups = [np.flatnonzero(sources == number) for number in range(len(weights))]
    if seconds is not None:
        groups = [group[balanced_rows(seconds[group])] if len(group) else group for group in groups]
    return Mixture(groups, weights, seed)


@dataclass(frozen=True)
class Draws:
    """Chooses the dataset rows of one rank's part of a step: from a mixture if there is one, else all equally often."""

    batch_size: int
    num_rows: int
    seed: int
    rank: int = 0
    world_size: int = 1
    mixture: Mixture | None = None
    balanced: NDArray[np.int64] | None = None
    """The `num_rows` rows that `balanced_rows` gives; None: the dataset's rows as they are."""

    def rows(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The dataset rows and positions of a step, each (batch_size / world_size,)."""
        if self.mixture is not None:
            positions = step_positions(step, self.rank, self.world_size, self.batch_size)
            return self.mixture.rows(positions), positions
        picked, positions = batch_indices(step, self.rank, self.world_size, self.batch_size, self.num_rows, self.seed)
        return picked if self.balanced is None else self.balanced[picked], positions


class ClipLoader:
    """Training batches of clips for one rank."""

    def __init__(
        self,
        dataset: ClipDataset | InMemoryClips,
        text_tokenizer: TextEncoder,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Raises: ValueError if the text tokenizer has no ids for some of the clips' image tokens."""
        used, available = dataset.num_tokens, text_tokenizer.vocabulary.num_image_tokens
        if used > available:
            raise ValueError(
                f"the clips use {used} image tokens, the text tokenizer has ids for only {available}; "
                "give the text tokenizer that was made for this image tokenizer"
            )
        self.dataset, self.tokenizer, self.config = dataset, text_tokenizer, config
        balanced = balanced_rows(dataset.seconds) if config.balance_lengths else None
        self.num_rows = len(dataset) if balanced is None else len(balanced)
        seconds = dataset.seconds if config.balance_lengths else None
        mixture = mixture_of_folders(dataset, config.weights, config.seed, seconds)
        self._draws = Draws(config.batch_size, self.num_rows, config.seed, rank, world_size, mixture, balanced)
        self._encode = lru_cache(CACHED_TEXTS)(text_tokenizer.encode)
        self._language = lru_cache(CACHED_TEXTS)(lambda caption: LANGUAGES.index(language(caption)))

    def batch(self, step: int) -> Batch:
        """This rank's clips of a step. Shapes: text (B, text_len), frames (B, num_frames or 1, frame_len)."""
        config = self.config
        rows, positions = self._draws.rows(step)
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
        groups = self._loss_groups(rows, [caption for _, caption in lengths_and_captions])
        return Batch(torch.from_numpy(text), torch.from_numpy(mask), torch.from_numpy(frames), seconds, groups)

    def _loss_groups(self, rows: NDArray[np.int64], captions: Sequence[str]) -> Tensor:
        """`Batch.loss_groups` of clips."""
        numbers = [
            self.dataset.sources(rows)
            if kind == "source"
            else np.array([self._language(caption) for caption in captions])
            for kind in self.config.loss_by
        ]
        return torch.from_numpy(np.array(numbers, np.int64).reshape(len(numbers), len(rows)).T.copy())

    def batches(self, first_step: int = 0, ahead: int = 2) -> Iterator[Batch]:
        """Endless batches from `first_step` on; a thread computes up to `ahead` of them in advance."""
        return prefetch(self.batch, first_step, ahead)

    def full_text(self, seconds: float, caption: str) -> list[int]:
        """The text ids of a clip before truncation to text_len, with the suffix if clips ever get it."""
        if self.config.task == "image":
            return self._image_text(caption, False)
        return self._clip_text(seconds, caption, False, self.config.suffix_probability > 0)

    def _image_text(self, caption: str, drop: bool) -> list[int]:
        prompt = self.config.prompt
        return prompt.image_text(self._encode, prompt.unconditional if drop else caption, NO_LIMIT)

    def _clip_text(self, seconds: float, caption: str, drop: bool, suffix: bool) -> list[int]:
        prompt, newline = self.config.prompt, self.tokenizer.vocabulary.newline
        if drop:
            return prompt.unconditional_text(self._encode, newline, seconds, NO_LIMIT)
        ending = prompt.video_suffix if suffix else ""
        return prompt.clip_text(self._encode, newline, seconds, caption, NO_LIMIT, suffix=ending)


class PairLoader:
    """Super-resolution training batches for one rank. Each frame's round is drawn uniformly."""

    def __init__(
        self,
        dataset: PairDataset,
        text_tokenizer: TextEncoder,
        config: SuperresConfig,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
    ) -> None:
        """`weights`: see `LoaderConfig`.

        Raises: ValueError if data and model differ in their grid sizes or number of image tokens.
        """
        used, available = dataset.num_tokens, config.vocabulary.num_image_tokens
        if used != available:
            raise ValueError(
                f"the pairs use {used} image tokens, the text tokenizer has ids for {available}; "
                "give the text tokenizer that was made for this image tokenizer"
            )
        sides = ("high_res_side", "low_res_side") if config.low_res_len else ("high_res_side",)
        for name in sides:
            got, expected = getattr(dataset, name), getattr(config, name)
            if got != expected:
                raise ValueError(f"the pairs have {name}={got} tokens, the model reads {expected}; set superres.{name}")
        self.dataset, self.config, self.seed = dataset, config, seed
        mixture = mixture_of_folders(dataset, weights, seed)
        self._draws = Draws(batch_size, len(dataset), seed, rank, world_size, mixture)
        self._rounds = round_masks(config)
        self._encode = lru_cache(CACHED_TEXTS)(text_tokenizer.encode)

    def batch(self, step: int) -> SuperresBatch:
        """This rank's frames of a step."""
        rows, positions = self._draws.rows(step)
        fine, coarse = self.dataset.pairs(rows)
        captions = map(normalise, self.dataset.texts(rows))
        text, text_mask = pad_captions([self._encode(caption) for caption in captions], self.config)
        drawn = torch.from_numpy(data_uniforms(self.seed, "round", positions) * len(self._rounds)).long()
        low_res = torch.from_numpy(coarse)[:, : self.config.low_res_len]  # none for the iterative model
        return SuperresBatch(text, text_mask, low_res, torch.from_numpy(fine), self._rounds[drawn], drawn + 1)

    def rows(self, step: int) -> NDArray[np.int64]:
        """The dataset rows of this rank's frames of a step."""
        return self._draws.rows(step)[0]

    def batches(self, first_step: int = 0, ahead: int = 2) -> Iterator[SuperresBatch]:
        """See `ClipLoader.batches`."""
        return prefetch(self.batch, first_step, ahead)


class FrameLoader:
    """Training batches of single frames for one rank, (B, 3, H, W) float in [0, 1], for the image tokenizer."""

    def __init__(
        self,
        dataset: FrameDataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
    ) -> None:
        """`weights`: see `LoaderConfig`."""
        self.dataset = dataset
        mixture = mixture_of_folders(dataset, weights, seed)
        self._draws = Draws(batch_size, len(dataset), seed, rank, world_size, mixture)

    def batch(self, step: int) -> Tensor:
        """This rank's frames of a step."""
        rows, _ = self._draws.rows(step)
        return rearrange(torch.from_numpy(self.dataset.frames(rows)), "b h w c -> b c h w", c=3).float() / 255

    def batches(self, first_step: int = 0, ahead: int = 2) -> Iterator[Tensor]:
        """See `ClipLoader.batches`."""
        return prefetch(self.batch, first_step, ahead)


def prefetch(compute: Callable[[int], T], first_step: int, ahead: int) -> Iterator[T]:
    """Yield compute(first_step), compute(first_step + 1), ...; a background thread computes up to `ahead` in advance.

    `ahead` = 0 computes each one on demand. An error in the thread is raised here, at the step where it occurred.
    Closing the iterator stops the thread.
    """
    if ahead <= 0:
        step = first_step
        while True:
            yield compute(step)
            step += 1
    results: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: tuple[T | None, Exception | None]) -> None:
        while not stop.is_set():
            try:
                return results.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        step = first_step
        while not stop.is_set():
            try:
                put((compute(step), None))
            except Exception as error:
                return put((None, error))
            step += 1

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
