"""The random numbers of sampling: drawn up front, addressed by what they are for and never by when they are used.

So a clip does not change with the batch it is in, the order of decoding, or the number of rounds after it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SampleKey(NamedTuple):
    """Whose numbers: the `number`-th sample of a caption under a seed."""

    seed: int
    caption: str
    number: int


def sample_keys(
    seed: int, captions: Sequence[str], samples_per_prompt: int = 1, seen: dict[str, int] | None = None
) -> list[SampleKey]:
    """Keys for `samples_per_prompt` samples of each caption, caption by caption; a repeated caption gets fresh ones.

    `seen`: how many samples of a caption there are already; what is given is counted up.
    """
    seen = {} if seen is None else seen
    keys = []
    for caption in captions:
        first = seen.get(caption, 0)
        keys += [SampleKey(seed, caption, number) for number in range(first, first + samples_per_prompt)]
        seen[caption] = first + samples_per_prompt
    return keys


def uniforms(keys: Sequence[SampleKey], round_number: int, frames: Iterable[int], frame_len: int) -> Tensor:
    """Two numbers in [0, 1) a slot, for the cluster and for the token: (samples, frames, frame_len, 2) float64.

    Round 0 is stage 1, later ones are stage 2's; `frames` number a round's frames in order of time.
    """
    frames = list(frames)
    out = np.empty((len(keys), len(frames), frame_len, 2))
    for row, key in zip(out, keys, strict=True):
        words = np.frombuffer(hashlib.sha256(key.caption.encode()).digest(), dtype="<u4")
        entropy = [key.seed, key.number, *words.tolist()]
        for of_frame, frame in zip(row, frames, strict=True):
            stream = np.random.SeedSequence(entropy, spawn_key=(round_number, frame))
            # 32 bits each: in float64, u * total < total then holds for any total, so no draw falls off the end
            bits = np.random.Generator(np.random.Philox(stream)).integers(1 << 32, size=(frame_len, 2))
            of_frame[:] = bits * 2.0**-32
    return torch.from_numpy(out)
