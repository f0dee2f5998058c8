"""Training of the image tokenizer: the loss, and the codebook's EMA updates, k-means initialisation and revival.

The functions keep no state except the buffers of `Quantizer` (`cluster_size`, `embed_avg`). With several processes, all
of them get the same codebook. Sources: van den Oord et al. 1711.00937 appendix A.1 (EMA), Dhariwal et al. 2005.00341
section 2 (revival from encoder outputs).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvideo.tokenizers.vqvae import CHUNK_ROWS, VQVAE, Quantizer, quantise


@torch.no_grad()
def update_codebook(
    quantizer: Quantizer, features: Tensor, ids: Tensor, decay: float = 0.99, eps: float = 1e-5
) -> None:
    """Move every code towards the mean of the features that chose it. Shapes: features (rows, dim), ids (rows,)."""
    num_codes = quantizer.embed.num_embeddings
    features = features.float()
    counts = _count(ids, num_codes).to(features)
    sums = torch.zeros_like(quantizer.embed_avg).index_add_(0, ids, features)
    if _is_distributed():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    quantizer.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
    quantizer.embed_avg.mul_(decay).add_(sums, alpha=1 - decay)
    total = quantizer.cluster_size.sum()
    # smoothed, so that a code not chosen for a long time does not cause a division by zero
    smoothed = (quantizer.cluster_size + eps) / (total + num_codes * eps) * total
    quantizer.embed.weight.copy_(quantizer.embed_avg / smoothed[:, None])


@torch.no_grad()
def revive_dead_codes(
    quantizer: Quantizer, features: Tensor, generator: torch.Generator, threshold: float = 0.03
) -> int:
    """Move codes chosen fewer than `threshold` times per batch (EMA) onto features of this batch; returns how many.

    Features are drawn without replacement, weighted by their squared distance from the nearest code, so that codes
    appear where they are missing.
    Shapes: features (rows, dim).
    """
    dead = torch.nonzero(quantizer.cluster_size < threshold).squeeze(1)
    features = features.float()
    dead = dead[: len(features)]
    if len(dead) == 0:
        return 0
    error = (features - quantizer.embed.weight[quantizer.nearest(features)]).square().sum(1)
    replacements = features[_draw(error, len(dead), generator)]
    if _is_distributed():
        dist.broadcast(replacements, src=0)
    _set_codes(quantizer, dead, replacements, cluster_size=max(1.0, 2 * threshold))
    return len(dead)


@torch.no_grad()
def initialise_codebook(
    quantizer: Quantizer, features: Tensor, generator: torch.Generator, iterations: int = 10
) -> None:
    """Set the codebook by k-means over features of the unquantised network. Shapes: features (rows, dim)."""
    features = features.float()
    num_codes = quantizer.embed.num_embeddings
    # Initial codes as in k-means||, far from those already chosen: most features are plain background, which needs few.
    codes = features[torch.randint(len(features), (1,), generator=generator)]
    newest, distance = codes, features.new_full((len(features),), float("inf"))
    while len(codes) < num_codes:
        # in chunks, and to the newest codes only: all features times 20,000 codes would take tens of GB
        closer = torch.cat([torch.cdist(chunk, newest).amin(1) for chunk in features.split(CHUNK_ROWS)])
        distance = torch.minimum(distance, closer.square())
        more = min(max(num_codes // 16, 1), num_codes - len(codes), len(features))
        newest = features[_draw(distance, more, generator)]
        codes = torch.cat([codes, newest])
    quantizer.embed.weight.copy_(codes)
    for _ in range(iterations):
        ids = quantizer.nearest(features)
        counts = _count(ids, num_codes).to(features)
        sums = torch.zeros_like(quantizer.embed_avg).index_add_(0, ids, features)
        means = sums / counts.clamp(min=1)[:, None]
        quantizer.embed.weight.copy_(torch.where(counts[:, None] > 0, means, quantizer.embed.weight))
    codes = quantizer.embed.weight.clone()
    if _is_distributed():
        dist.broadcast(codes, src=0)
    _set_codes(quantizer, torch.arange(num_codes), codes, cluster_size=1.0)


def codebook_usage(ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Fraction of codes that occur in `ids`, and the perplexity of their distribution (1 to num_codes); scalars."""
    return usage_of_counts(_count(ids.flatten(), num_codes))


def usage_of_counts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """`codebook_usage` from the number of times that each code occurs, (num_codes,)."""
    counts = counts.double()
    p = counts / counts.sum().clamp(min=1)
    perplexity = torch.exp(-torch.xlogy(p, p).sum())
    return (counts > 0).double().mean(), perplexity


def _count(ids: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs; unlike `bincount`, this does not wait for the GPU."""
    return ids.new_zeros(num_codes).index_add_(0, ids, torch.ones_like(ids))


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw row indices without replacement by weight, on the generator's device, which need not be the GPU."""
    return torch.multinomial((weights + 1e-12).to(generator.device), count, generator=generator)


def _set_codes(quantizer: Quantizer, which: Tensor, codes: Tensor, cluster_size: float) -> None:
    quantizer.embed.weight[which] = codes.to(quantizer.embed.weight.dtype)
    quantizer.cluster_size[which] = cluster_size
    quantizer.embed_avg[which] = codes * cluster_size


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the terms; each is a mean, over pixels of normalised images or, for the commitment, over features."""

    l1: float = 1.0
    l2: float = 1.0
    edge: float = 1.0  # differences of neighbouring pixels, at each of edge_scales
    edge_scales: int = 2  # full resolution, then halved
    commitment: float = 1.0
    relative_commitment: bool = False  # relative to the features' variance, so that their scale does not matter


@dataclass(frozen=True)
class TokenizerLoss:
    """Loss of one batch; `features` (rows, dim) and `ids` (rows,) are for the codebook update that follows."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """Scalars."""
    features: Tensor
    ids: Tensor | None  # None while codes are not used yet


def edge_loss(output: Tensor, target: Tensor, scales: int) -> Tensor:
    """Mean absolute error of neighbouring pixels' differences, over scales. Shapes: two (batch, 3, h, w) -> ()."""
    error = output - target
    total = error.new_zeros(())
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return total / scales


def tokenizer_loss(
    model: VQVAE, images: Tensor, level: int, config: TokenizerLossConfig, use_codes: bool = True
) -> TokenizerLoss:
    """The loss of one batch of normalised images: reconstruction with an edge term, plus the commitment loss.

    There is no perceptual or adversarial network: small images on mostly plain backgrounds need their edges in the
    right place, and the edge term penalises misplaced ones at several scales. Without `use_codes` it trains a plain
    autoencoder, from whose features the codebook is initialised.
    """
    features = model.features(images, level)
    rows = rearrange(features.detach(), "b c h w -> (b h w) c").float()
    ids = None
    commitment = images.new_zeros(())
    codes = features
    if use_codes:
        codes, ids, commitment = quantise(model.quantize, features)
        if config.relative_commitment:
            commitment = commitment / rows.var(0).mean().clamp(min=1e-8)
    error = (model.decode_codes(codes, level) - images).float()
    l1, l2 = error.abs().mean(), error.square().mean()
    edge = edge_loss(error, torch.zeros_like(error), config.edge_scales)
    loss = config.l1 * l1 + config.l2 * l2 + config.edge * edge + config.commitment * commitment
    terms = {"loss": loss, "l1": l1, "l2": l2, "edge": edge, "commitment": commitment}
    metrics = {name: value.detach() for name, value in terms.items()}
    if ids is not None:
        metrics["codebook_used"], metrics["perplexity"] = codebook_usage(ids, model.config.num_codes)
        ids = ids.flatten()
    return TokenizerLoss(loss, metrics, rows, ids)
