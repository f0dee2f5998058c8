"""The training loss of the image tokenizer: reconstruction with an edge term, plus the quantiser's commitment.

No perceptual or adversarial network: small images on a mostly plain ground need their edges in the right place, and
that is what the difference terms ask for at several scales.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvideo.tokenizers.quantise import codebook_usage, quantise
from cogvideo.tokenizers.vqvae import VQVAE


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the terms; each is a mean over pixels of normalised images."""

    l1: float = 1.0
    l2: float = 1.0
    edge: float = 1.0  # differences of neighbouring pixels, at each of edge_scales
    edge_scales: int = 2  # full resolution, then halved
    commitment: float = 1.0


@dataclass(frozen=True)
class TokenizerStep:
    """One batch's outcome; `features` (rows, dim) and `ids` (rows,) are for the codebook update that follows."""

    loss: Tensor
    metrics: dict[str, float]
    features: Tensor
    ids: Tensor | None  # None while the codes are not used yet


def edge_loss(output: Tensor, target: Tensor, scales: int) -> Tensor:
    """Mean absolute error of neighbouring pixels' differences, over scales. Shapes: (batch, 3, h, w) both -> ()."""
    error = output - target
    total = error.new_zeros(())
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return total / scales


def tokenizer_step(
    model: VQVAE, images: Tensor, level: int, config: TokenizerLossConfig, use_codes: bool = True
) -> TokenizerStep:
    """The loss of one batch of normalised images; without codes a plain autoencoder, to start the codebook from."""
    features = model.features(images, level)
    rows = rearrange(features.detach(), "b c h w -> (b h w) c").float()
    ids = None
    commitment = images.new_zeros(())
    codes = features
    if use_codes:
        codes, ids, commitment = quantise(model.quantize, features)
    error = (model.decode_codes(codes, level) - images).float()
    l1, l2 = error.abs().mean(), error.square().mean()
    edge = edge_loss(error, torch.zeros_like(error), config.edge_scales)
    loss = config.l1 * l1 + config.l2 * l2 + config.edge * edge + config.commitment * commitment
    terms = {"loss": loss, "l1": l1, "l2": l2, "edge": edge, "commitment": commitment}
    metrics = {name: float(value.detach()) for name, value in terms.items()}
    if ids is not None:
        metrics["codebook_used"], metrics["perplexity"] = codebook_usage(ids, model.config.num_codes)
        ids = ids.flatten()
    return TokenizerStep(loss, metrics, rows, ids)
