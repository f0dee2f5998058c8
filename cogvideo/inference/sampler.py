"""From logits to tokens, by inverse CDF from numbers drawn beforehand. Stateless: the same inputs give the same tokens.

CogVideo's cluster sampler: a cluster of codes first, then a code in it. With every code a cluster of its own
(labels = arange) it is plain top-k sampling.
"""

import ctypes
from copy import copy
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cogvideo.kernels import cpu as few_rows

_EACH = 100
"""Multiplications that a score's share of a draw takes as long as."""


class Draw(Protocol):
    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Shapes: logits (..., num_image_tokens) float32; uniforms (..., 2) in [0, 1) -> token ids (...) int64."""
        ...


class ClusterDraw:
    """Draw a cluster among the `top_k` likeliest at `temperature`, then a token of it at `token_temperature`.

    Source: the published CogVideo's sampling strategy of that name. Cost: one softmax over all tokens; what follows is
    over clusters, and over the tokens of one cluster. On a CPU few_rows.cpp does it in one call, where it can be had:
    a dozen operations on a row or two would take a tenth of a step.
    """

    def __init__(self, labels: np.ndarray, temperature: float, top_k: int, token_temperature: float) -> None:
        """`labels` (num_image_tokens,): the cluster of each code, 0 .. num_clusters - 1, none empty."""
        sizes = np.bincount(labels)
        ordered, ends = np.argsort(labels, kind="stable"), np.cumsum(sizes)
        by_cluster = np.split(ordered, ends[:-1])
        # members of each cluster in a row, filled up with -1
        members = np.full((len(sizes), sizes.max()), -1)
        for row, tokens in zip(members, by_cluster, strict=True):
            row[: len(tokens)] = tokens
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.members = torch.from_numpy(members.astype(np.int64))
        self.temperature, self.top_k, self.token_temperature = temperature, min(top_k, len(sizes)), token_temperature
        self._of_cluster = torch.from_numpy(ordered), torch.from_numpy(np.concatenate([[0], ends]))

    def to(self, device: torch.device) -> "ClusterDraw":
        moved = copy(self)
        moved.labels, moved.members = self.labels.to(device), self.members.to(device)
        return moved

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        if logits.device.type == "cpu" and logits.dtype == torch.float32 and few_rows.library() is not None:
            return self._in_one_call(logits, uniforms)
        probabilities = (logits / self.temperature).softmax(-1, dtype=torch.float64)
        clusters = probabilities.new_zeros(*logits.shape[:-1], len(self.members))
        clusters.index_add_(-1, self.labels, probabilities)
        cluster = pick(keep_top(clusters, self.top_k), uniforms[..., 0])
        tokens = self.members[cluster]
        of_cluster = logits.gather(-1, tokens.clamp(min=0)).masked_fill_(tokens < 0, float("-inf"))
        within = (of_cluster / self.token_temperature).softmax(-1, dtype=torch.float64)
        return tokens.gather(-1, pick(within, uniforms[..., 1]).unsqueeze(-1)).squeeze(-1)

    def _in_one_call(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """The same to float rounding."""
        kernels, (codes, starts) = few_rows.library(), self._of_cluster
        assert kernels is not None
        logits, uniforms = logits.contiguous(), uniforms.to(torch.float64).contiguous()
        assert logits.shape[-1] == len(self.labels) and uniforms.shape == (*logits.shape[:-1], 2)
        clusters = _Clusters(
            *map(few_rows.address, (self.labels, codes, starts)),
            *(len(self.labels), len(self.members), self.top_k),
            *(self.temperature, self.token_temperature),
        )
        drawn = torch.empty(logits.shape[:-1], dtype=torch.int64)
        pointers = (ctypes.byref(clusters), *map(few_rows.address, (logits, uniforms, drawn)))
        kernels.cogvideo_draw(*pointers, drawn.numel(), few_rows.threads_for(_EACH * logits.numel()))
        return drawn


class _Clusters(ctypes.Structure):
    """`Clusters` of few_rows.cpp. It points into tensors, which whoever made it must keep."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("labels", "codes", "starts")),
        *((name, ctypes.c_long) for name in ("num_codes", "num_clusters", "top_k")),
        *((name, ctypes.c_float) for name in ("temperature", "token_temperature")),
    )


def keep_top(weights: Tensor, k: int) -> Tensor:
    """Zero all but the k largest of the last axis (more where the k-th is tied)."""
    return weights.masked_fill(weights < weights.topk(k, dim=-1).values[..., -1:], 0.0)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the first index whose running sum exceeds uniform * total. Weights need not be normalised.

    In the order of the indices, not of the weights: two weights that are nearly equal may then swap their order, by
    rounding, without any effect. Shapes: weights (..., n) float64, uniform (...) in [0, 1) -> (...) int64.
    """
    running = weights.cumsum(-1)
    return (running <= running[..., -1:] * uniform.unsqueeze(-1)).sum(-1)
