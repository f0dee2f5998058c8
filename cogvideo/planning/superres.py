"""What training of a super-resolution model computes. Arithmetic, no model built."""

from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import Tiles
from cogvideo.superres.rounds import all_rounds
from cogvideo.superres.transformer import sight


def training_flops(config: SuperresConfig, *, frozen_trunk: bool) -> float:
    """Forward and backward of one frame: matrix products and attention as computed, nothing recomputed.

    A backward needs each product twice, once for its input and once for its weights; a frozen trunk only the first, and
    neither for the context, which then depends on frozen weights alone. Logits: as many as a round asks for on average.
    """
    h, layers, context = config.hidden_size, config.num_layers, config.text_len + config.low_res_len
    square = 2 * h * h
    attention, mlp = layers * 4 * square * config.high_res_len, layers * 8 * square * config.high_res_len
    of_context = layers * 12 * square * context + layers * 4 * h * context**2
    seen = sight(config)
    scores = layers * 4 * h * (_pairs(seen.context) + _pairs(seen.own))
    logits = 2 * h * config.vocabulary.num_image_tokens * float(all_rounds(config).sum(1).float().mean())
    forward = attention + mlp + of_context + scores + logits
    if frozen_trunk:
        return forward + 2 * attention + mlp + logits + 2.5 * scores
    return forward + 2 * (attention + mlp + of_context + logits) + 2.5 * scores


def _pairs(tiles: Tiles) -> int:
    return tiles.queries.numel() * tiles.keys.shape[1]
