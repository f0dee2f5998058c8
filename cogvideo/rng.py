"""Random numbers keyed by position: what a number is used for determines its value, never when or where it is drawn.

Three families, none of which keeps a generator's state:

    sample_uniforms   sampling: (seed, caption, sample index, round, frame) -> uniforms for every slot
    data_uniforms, epoch_permutation
                      data: (seed, stream, position) -> one uniform; (seed, epoch) -> the order of an epoch
    generator_for, seed_dropout
                      training: (seed, stream, position) -> a torch generator

So a sampled clip does not depend on its batch, the decoding schedule or later rounds, and resuming training repeats
the same draws on any number of processes.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

DATA_STREAMS = {"order": 0, "dropout": 1, "frame": 2, "suffix": 3, "round": 4}
"""Keys of the independent random streams of data loading."""


class SampleKey(NamedTuple):
    """Identifies one sample's random numbers."""

    seed: int
    caption: str
    number: int
    """Index among the samples of this caption."""


def sample_keys(
    seed: int, captions: Sequence[str], samples_per_prompt: int = 1, seen: dict[str, int] | None = None
) -> list[SampleKey]:
    """Keys for `samples_per_prompt` samples of each caption, in order; a repeated caption gets new sample numbers.

    `seen` counts the samples each caption already has; it is updated in place.
    """
    seen = {} if seen is None else seen
    keys = []
    for caption in captions:
        first = seen.get(caption, 0)
        keys += [SampleKey(seed, caption, number) for number in range(first, first + samples_per_prompt)]
        seen[caption] = first + samples_per_prompt
    return keys


def sample_uniforms(keys: Sequence[SampleKey], round_number: int, frames: Iterable[int], frame_len: int) -> Tensor:
    """Two numbers in [0, 1) per slot, for drawing its cluster and its token.

    Shapes: returns (samples, frames, frame_len, 2) float64.
    Round 0 is stage 1, later rounds are stage 2; `frames` are indices in time order within the round.
    """
    frames = list(frames)
    out = np.empty((len(keys), len(frames), frame_len, 2))
    for sample, key in zip(out, keys, strict=True):
        words = np.frombuffer(hashlib.sha256(key.caption.encode()).digest(), dtype="<u4")
        entropy = [key.seed, key.number, *words.tolist()]
        for numbers, frame in zip(sample, frames, strict=True):
            stream = np.random.SeedSequence(entropy, spawn_key=(round_number, frame))
            # 32 bits each: in float64, u * total < total then holds for any total, so no draw falls off the end
            bits = np.random.Generator(np.random.Philox(stream)).integers(1 << 32, size=(frame_len, 2))
            numbers[:] = bits * 2.0**-32
    return torch.from_numpy(out)


def data_uniforms(seed: int, stream: str, positions: ArrayLike) -> NDArray[np.float64]:
    """One number in [0, 1) per position; `stream` is a key of DATA_STREAMS."""
    key = DATA_STREAMS[stream]
    return np.array([np.random.default_rng([seed, key, int(position)]).random() for position in np.asarray(positions)])


@lru_cache(maxsize=4)  # a step touches one or two epochs
def epoch_permutation(seed: int, epoch: int, num_rows: int) -> NDArray[np.integer]:
    """The order in which an epoch visits a dataset's rows."""
    order = np.random.default_rng([seed, DATA_STREAMS["order"], epoch]).permutation(num_rows)
    return order.astype(np.int32) if num_rows < 1 << 31 else order  # half the memory in the cache


def stream_key(seed: int, stream: str, *position: int) -> int:
    """A 63-bit key from (seed, stream, position), the same on every machine."""
    text = ":".join(map(str, (seed, stream, *position)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, stream: str, *position: int) -> torch.Generator:
    """A CPU generator for one use of random numbers in training."""
    return torch.Generator().manual_seed(stream_key(seed, stream, *position))


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Re-seed torch's global generators, which dropout draws from.

    `micro_batch` is numbered over all ranks. A step's clips get the same masks on any number of processes, as long as
    the step is split into the same micro-batches; with any other split, the masks differ.
    """
    torch.manual_seed(stream_key(seed, "dropout", step, micro_batch))
