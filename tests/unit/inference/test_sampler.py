"""The cluster sampler against a slow reference and its exact distribution; cluster labels by k-means and from files."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.inference.sampler import ClusterSampler, invert_cdf, keep_top, kmeans_labels, load_labels
from cogvideo.kernels import cpu

T1, K, T2 = 1.3, 2, 0.7
LABELS = np.array([0, 1, 2, 0, 1, 2, 2, 3])
LOGITS = [0.3, 1.2, -0.5, 0.9, 0.1, 1.5, -1.0, 0.2]


with_and_without_kernel = pytest.mark.parametrize("compiled", [True, False])


@contextmanager
def sampling(compiled: bool) -> Iterator[None]:
    """Use the compiled kernel, or PyTorch's operations."""
    if compiled and cpu.library() is None:
        pytest.skip("no C++ compiler here")
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(cpu, "library", lambda: None)
        yield


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(v - max(values)) for v in values]
    return [w / sum(weights) for w in weights]


def first_beyond(weights: list[float], uniform: float) -> int:
    total, target = 0.0, uniform * sum(weights)
    for index, weight in enumerate(weights):
        total += weight
        if total > target:
            return index
    raise AssertionError


def slow_sample(logits: list[float], labels: np.ndarray, t1: float, k: int, t2: float, u: tuple[float, float]) -> int:
    """By definition: the clusters' masses, the top k of them, one of those, then one of its tokens."""
    p = softmax([l / t1 for l in logits])
    mass = [sum(p[i] for i in range(len(p)) if labels[i] == c) for c in range(max(labels) + 1)]
    best = sorted(range(len(mass)), key=lambda c: -mass[c])[:k]
    cluster = first_beyond([mass[c] if c in best else 0.0 for c in range(len(mass))], u[0])
    tokens = [i for i in range(len(logits)) if labels[i] == cluster]
    return tokens[first_beyond(softmax([logits[i] / t2 for i in tokens]), u[1])]


def exact_probabilities() -> np.ndarray:
    p = softmax([l / T1 for l in LOGITS])
    mass = [sum(p[i] for i in range(8) if LABELS[i] == c) for c in range(4)]
    best = sorted(range(4), key=lambda c: -mass[c])[:K]
    out = np.zeros(8)
    for c in best:
        tokens = [i for i in range(8) if LABELS[i] == c]
        for token, q in zip(tokens, softmax([LOGITS[i] / T2 for i in tokens]), strict=True):
            out[token] = mass[c] / sum(mass[b] for b in best) * q
    return out


@with_and_without_kernel
@given(
    seed=st.integers(0, 2**16),
    clusters=st.integers(1, 9),
    k=st.integers(1, 10),
    t1=st.floats(0.2, 3),
    t2=st.floats(0.2, 3),
    batch=st.sampled_from([(), (3,), (2, 4)]),
)
def test_equals_slow_reference(
    compiled: bool, seed: int, clusters: int, k: int, t1: float, t2: float, batch: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(clusters), rng.integers(clusters, size=20)])
    logits = torch.from_numpy(rng.normal(size=(*batch, len(labels)), scale=3).astype(np.float32))
    uniforms = torch.from_numpy(rng.random((*batch, 2)))
    with sampling(compiled):
        sampled = ClusterSampler(labels, t1, k, t2)(logits, uniforms)
    assert sampled.shape == batch and sampled.dtype == torch.int64
    for index in np.ndindex(*batch):
        u = tuple(uniforms[index].tolist())
        assert sampled[index].item() == slow_sample(logits[index].tolist(), labels, t1, min(k, clusters), t2, u)


@with_and_without_kernel
def test_distribution_by_chi_square(compiled: bool) -> None:
    number = 40_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random((number, 2)))
    with sampling(compiled):
        sampled = ClusterSampler(LABELS, T1, K, T2)(torch.tensor(LOGITS).expand(number, -1), uniforms)
    counts, expected = np.bincount(sampled, minlength=8), exact_probabilities() * number
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert possible.sum() == 5
    assert chi_square < 18.5  # 4 degrees of freedom: one run in a thousand is beyond


@with_and_without_kernel
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_broken_logits_still_give_valid_tokens(compiled: bool, broken: float) -> None:
    logits = torch.tensor(LOGITS).repeat(3, 1)
    logits[0], logits[1, ::2], logits[2, 5] = broken, broken, broken
    uniforms = torch.tensor([[0.0, 0.999], [0.5, 0.5], [0.999, 0.0]], dtype=torch.float64)
    with sampling(compiled):
        sampled = ClusterSampler(LABELS, T1, K, T2)(logits, uniforms)
    assert ((sampled >= 0) & (sampled < len(LABELS))).all()


def test_one_token_per_cluster_is_plain_top_k() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 5.0]])
    greedy = ClusterSampler(np.arange(4), 1.0, 1, 1.0)
    assert all(greedy(logits, torch.tensor([[u, u]])).item() == 3 for u in (0.0, 0.5, 0.999))
    two = ClusterSampler(np.arange(4), 1.0, 2, 1.0)
    sampled = two(logits.expand(1000, -1), torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)))
    assert set(sampled.tolist()) == {1, 3}


def test_invert_cdf_never_returns_an_index_without_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0], dtype=torch.float64) / 7
    ends = torch.tensor([0.0, 1 / 3 - 1e-12, 1 / 3 + 1e-12, 1 - 2.0**-32], dtype=torch.float64)
    assert invert_cdf(weights.expand(4, -1), ends).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(("k", "expected"), [(1, [0, 5, 0, 0]), (2, [0, 5, 3, 3]), (4, [1, 5, 3, 3])])
def test_keep_top_keeps_ties(k: int, expected: list[float]) -> None:
    assert keep_top(torch.tensor([1.0, 5.0, 3.0, 3.0]), k).tolist() == expected


def test_kmeans_finds_groups_and_repeats() -> None:
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = np.arange(60) % 3
    codebook = centres[truth] + np.random.default_rng(0).normal(size=(60, 2))
    labels = kmeans_labels(codebook, 3)
    assert labels.dtype == np.int64 and set(labels) == {0, 1, 2}
    assert len({(a, b) for a, b in zip(labels, truth, strict=True)}) == 3
    assert (labels == kmeans_labels(codebook, 3)).all()


def test_as_many_clusters_as_codes() -> None:
    assert kmeans_labels(np.zeros((5, 2)), 9).tolist() == [0, 1, 2, 3, 4]


def test_labels_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([4, 4, 9, 0]))
    assert load_labels(tmp_path / "a.npy", 4).tolist() == [1, 1, 2, 0]
    with pytest.raises(ValueError, match="each of the 5 codes"):
        load_labels(tmp_path / "a.npy", 5)
    np.save(tmp_path / "b.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"b\.npy holds object"):
        load_labels(tmp_path / "b.npy", 2)
    (tmp_path / "c.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"c\.npy is not a readable"):
        load_labels(tmp_path / "c.npy", 2)
