"""From logits to tokens: CogVideo's cluster sampler, and the clusters of image tokens that it samples from first.

Sampling inverts the CDF at random numbers drawn in advance, so the same inputs always give the same tokens. With each
token in a cluster of its own (labels = arange) it is plain top-k sampling.
"""

from copy import copy
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cogvideo.files import open_npy

try:
    from cogvideo.kernels import cpu as cpu_kernels
except ModuleNotFoundError:  # kernels are optional
    cpu_kernels = None  # type: ignore[assignment]

PUBLISHED_CLUSTERS = 500
LABEL_TYPES = ("<i8", "<i4", "<i2", "<u8", "<u4", "<u2", "|u1", "|i1")


class TokenSampler(Protocol):
    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Shapes: logits (..., num_image_tokens) float32; uniforms (..., 2) in [0, 1) -> token ids (...) int64."""
        ...


class ClusterSampler:
    """Sample one of the `top_k` likeliest clusters at `temperature`, then one of its tokens at `token_temperature`.

    Source: the published CogVideo's sampling strategy of that name. Cost: one softmax over all tokens; the rest is over
    clusters and over the tokens of one cluster. On a CPU it is a single kernel call where possible: a dozen PyTorch
    operations on a row or two would take a tenth of a step.
    """

    def __init__(self, labels: np.ndarray, temperature: float, top_k: int, token_temperature: float) -> None:
        """`labels` (num_image_tokens,): the cluster of each token, 0 to num_clusters - 1, none empty."""
        sizes = np.bincount(labels)
        by_cluster, ends = np.argsort(labels, kind="stable"), np.cumsum(sizes)
        # one row of tokens per cluster, padded with -1
        members = np.full((len(sizes), sizes.max()), -1)
        for row, tokens in zip(members, np.split(by_cluster, ends[:-1]), strict=True):
            row[: len(tokens)] = tokens
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.members = torch.from_numpy(members.astype(np.int64))
        self.temperature, self.top_k, self.token_temperature = temperature, min(top_k, len(sizes)), token_temperature
        self._by_cluster, self._starts = torch.from_numpy(by_cluster), torch.from_numpy(np.concatenate([[0], ends]))

    def to(self, device: torch.device) -> "ClusterSampler":
        moved = copy(self)
        moved.labels, moved.members = self.labels.to(device), self.members.to(device)
        return moved

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        if cpu_kernels is not None:
            sampled = cpu_kernels.sample_clusters(
                logits,
                uniforms,
                self.labels,
                self._by_cluster,
                self._starts,
                temperature=self.temperature,
                top_k=self.top_k,
                token_temperature=self.token_temperature,
            )
            if sampled is not None:
                return sampled
        probabilities = (logits / self.temperature).softmax(-1, dtype=torch.float64)
        clusters = probabilities.new_zeros(*logits.shape[:-1], len(self.members))
        clusters.index_add_(-1, self.labels, probabilities)
        cluster = invert_cdf(keep_top(clusters, self.top_k), uniforms[..., 0])
        tokens = self.members[cluster]
        token_logits = logits.gather(-1, tokens.clamp(min=0)).masked_fill_(tokens < 0, float("-inf"))
        within = (token_logits / self.token_temperature).softmax(-1, dtype=torch.float64)
        return tokens.gather(-1, invert_cdf(within, uniforms[..., 1]).unsqueeze(-1)).squeeze(-1)


def keep_top(weights: Tensor, k: int) -> Tensor:
    """Zero all but the k largest of the last axis (more where the k-th is tied)."""
    return weights.masked_fill(weights < weights.topk(k, dim=-1).values[..., -1:], 0.0)


def invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose running sum exceeds uniform * total. Weights need not be normalised.

    Running sums are in index order, not sorted by weight: in a sort, rounding may swap two nearly equal weights.
    Shapes: weights (..., n) float64, uniform (...) in [0, 1) -> (...) int64.
    """
    running = weights.cumsum(-1)
    return (running <= running[..., -1:] * uniform.unsqueeze(-1)).sum(-1)


def kmeans_labels(codebook: np.ndarray, num_clusters: int, seed: int = 0) -> np.ndarray:
    """k-means++ over codes (num_codes, dim): the cluster of each, (num_codes,) int64, none empty.

    With as many clusters as codes, or more, each code is its own cluster.
    """
    if num_clusters >= len(codebook):
        return np.arange(len(codebook))
    from sklearn.cluster import KMeans  # slow to import and rarely needed

    labels = KMeans(num_clusters, init="k-means++", n_init=4, random_state=seed).fit_predict(codebook)
    return _without_empty_clusters(labels)


def load_labels(path: Path, num_codes: int) -> np.ndarray:
    """Cluster labels from a .npy file. Raises: ValueError unless it holds a non-negative integer for each code."""
    try:
        labels = open_npy(path, LABEL_TYPES, (num_codes,))
    except ValueError as error:
        raise ValueError(f"{error}: the cluster index of each of the {num_codes} codes") from None
    if labels.min() < 0:
        raise ValueError(
            f"{path} holds {labels.min()}; expected a non-negative cluster index for each of the {num_codes} codes"
        )
    return _without_empty_clusters(labels)


def _without_empty_clusters(labels: np.ndarray) -> np.ndarray:
    """Renumber the clusters in use from 0."""
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int64)
