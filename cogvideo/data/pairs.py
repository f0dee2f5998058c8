"""Batches of frames for super-resolution, by position, as `loader.py` has it: step s alone says what it holds."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from cogvideo.data.dataset import PairDataset
from cogvideo.data.loader import TextEncoder, batch_indices, prefetch
from cogvideo.rng import data_uniforms
from cogvideo.superres.batch import SuperresBatch, pad_captions
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks


class PairLoader:
    """Training batches of one rank. Which round a frame is learned for is drawn uniformly."""

    def __init__(
        self,
        dataset: PairDataset,
        text_tokenizer: TextEncoder,
        config: SuperresConfig,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Raises: ValueError if the data are not of the model's sizes, or of another image tokenizer."""
        made, known = dataset.num_tokens, config.vocabulary.num_image_tokens
        if made != known:
            raise ValueError(
                f"the pairs are of {made} image tokens, the text tokenizer leaves ids for {known}; "
                "give the text tokenizer that was made for this image tokenizer"
            )
        sides = ("high_res_side", "low_res_side") if config.low_res_len else ("high_res_side",)
        for name in sides:
            got, expected = getattr(dataset, name), getattr(config, name)
            if got != expected:
                raise ValueError(f"the pairs have {name}={got} tokens, the model reads {expected}; set superres.{name}")
        self.dataset, self.config, self.batch_size = dataset, config, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self._rounds = round_masks(config)
        self._encode = lru_cache(maxsize=1 << 16)(text_tokenizer.encode)  # captions repeat

    def batch(self, step: int) -> SuperresBatch:
        """This rank's frames of a step."""
        rows, positions = self._indices(step)
        fine, coarse = self.dataset.pairs(rows)
        captions = [" ".join(caption.split()) for caption in self.dataset.texts(rows)]
        text, text_mask = pad_captions([self._encode(caption) for caption in captions], self.config)
        drawn = torch.from_numpy(data_uniforms(self.seed, "round", positions) * len(self._rounds)).long()
        low_res = torch.from_numpy(coarse)[:, : self.config.low_res_len]  # none for the iterative model
        return SuperresBatch(text, text_mask, low_res, torch.from_numpy(fine), self._rounds[drawn], drawn + 1)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Which of the dataset's rows those frames are."""
        return self._indices(step)[0]

    def _indices(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return batch_indices(step, self.rank, self.world, self.batch_size, len(self.dataset), self.seed)

    def batches(self, first_step: int = 0, ahead: int = 2) -> Iterator[SuperresBatch]:
        """As `ClipLoader.batches`."""
        return prefetch(self.batch, first_step, ahead)
