"""Random numbers by position: each use names its stream and place, so resuming needs no saved generator."""

import hashlib

import torch


def key_of(seed: int, stream: str, *position: int) -> int:
    """A 63-bit key from (seed, stream, position), the same on every machine."""
    text = ":".join(map(str, (seed, stream, *position)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, stream: str, *position: int) -> torch.Generator:
    return torch.Generator().manual_seed(key_of(seed, stream, *position))


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Re-seed torch's own generators, which dropout draws from.

    `micro_batch` counts over all processes: the same clips get the same masks on any number of them.
    """
    torch.manual_seed(key_of(seed, "dropout", step, micro_batch))
