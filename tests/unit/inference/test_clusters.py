"""Cluster labels: k-means, files, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from cogvideo.inference.clusters import kmeans_labels, load_labels


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


def test_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([4, 4, 9, 0]))
    assert load_labels(tmp_path / "a.npy", 4).tolist() == [1, 1, 2, 0]
    with pytest.raises(ValueError, match="each of 5 codes"):
        load_labels(tmp_path / "a.npy", 5)
    np.save(tmp_path / "b.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"b\.npy is not a readable"):
        load_labels(tmp_path / "b.npy", 2)
    (tmp_path / "c.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"c\.npy is not a readable"):
        load_labels(tmp_path / "c.npy", 2)
