"""Clusters of the image codebook, which the token sampler chooses among first: from a label file, or by k-means."""

from pathlib import Path

import numpy as np

PUBLISHED_CLUSTERS = 500


def kmeans_labels(codebook: np.ndarray, num_clusters: int, seed: int = 0) -> np.ndarray:
    """k-means++ over codes (num_codes, dim): the cluster of each, (num_codes,) int64, every one of them used.

    As many clusters as codes, or more, gives each code its own.
    """
    if num_clusters >= len(codebook):
        return np.arange(len(codebook))
    from sklearn.cluster import KMeans  # slow to import, and rarely needed

    labels = KMeans(num_clusters, init="k-means++", n_init=4, random_state=seed).fit_predict(codebook)
    return compact(labels)


def load_labels(path: Path, num_codes: int) -> np.ndarray:
    """Labels from a .npy file. Raises: ValueError if it does not hold one non-negative integer for each code."""
    try:
        with open(path, "rb") as file:  # np.load would also take archives and pickles
            labels = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable .npy file: {error}") from None
    if labels.shape != (num_codes,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"{path} holds {labels.dtype} of shape {labels.shape}, expected one cluster number for each of "
            f"{num_codes} codes"
        )
    return compact(labels)


def compact(labels: np.ndarray) -> np.ndarray:
    """Renumber so that no cluster is empty."""
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int64)
