"""Which places of the fine grid the iterative model redraws in which round, as data. Source: CogView2's published code.

A 6 x 6 pattern tiles the grid. Round m redraws the places whose number is at least m, all at once, each asked for by
BOI: fewer every round, so that what is drawn later sees more of what is settled. Places of 0 and below stay. The direct
model has one round, which asks for all places.
"""

import numpy as np
import torch
from torch import Tensor

from cogvideo.superres.config import SuperresConfig

PATTERN = np.array(
    [
        [-1, 0, 1, 2, 3, 4],
        [0, -1, 2, -1, -2, 5],
        [1, -2, 3, 4, 5, 6],
        [2, 3, 4, 5, -1, 1],
        [3, -1, -2, 0, -1, 2],
        [4, 5, 6, 1, 3, -2],
    ]
)
TOP_K = (40, 40, 40, 20, 20, 10)
"""Of the token sampler in each round, at temperature 1; there are as many rounds."""


def redrawn(side: int, number: int) -> Tensor:
    """Places that round `number`, 1 to 6, redraws: (side * side,) bool."""
    assert 1 <= number <= len(TOP_K)
    y, x = np.divmod(np.arange(side * side), side)
    return torch.from_numpy(PATTERN[y % 6, x % 6] >= number)


def all_rounds(config: SuperresConfig) -> Tensor:
    """Places that each of a model's rounds asks for: (rounds, high_res_len) bool."""
    if config.method == "direct":
        return torch.ones(1, config.high_res_len, dtype=torch.bool)
    return torch.stack([redrawn(config.high_res_side, number) for number in range(1, len(TOP_K) + 1)])
