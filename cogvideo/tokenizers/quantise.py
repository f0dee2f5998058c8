"""The codebook and its training: straight-through codes, EMA updates, k-means initialisation, dead-code revival.

The functions keep no state except the buffers of `Quantizer` (`cluster_size`, `embed_avg`). With several processes, all
of them get the same codebook. Sources: van den Oord et al. 1711.00937
appendix A.1 (EMA), Dhariwal et al. 2005.00341 section 2 (revival from encoder outputs).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CHUNK_ROWS = 4096


class Quantizer(nn.Module):
    """The codebook. `update_codebook` changes it, gradients never do; the buffers are the state of its averages."""

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, z_channels: int, embedding_dim: int, num_codes: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(z_channels, embedding_dim, kernel_size=1)
        self.embed = nn.Embedding(num_codes, embedding_dim)
        self.embed.weight.requires_grad_(False)
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_avg", self.embed.weight.detach().clone())

    def nearest(self, vectors: Tensor, chunk: int = CHUNK_ROWS) -> Tensor:
        """The nearest code of every vector by Euclidean distance. Shapes: vectors (rows, embedding_dim) -> (rows,)."""
        codes = self.embed.weight.float()
        squares = codes.square().sum(1)
        # |v - c|^2 without |v|^2, which is the same for every code; in chunks, as rows x 20,000 codes is large
        ids = [torch.addmm(squares, rows, codes.T, alpha=-2).argmin(1) for rows in vectors.float().split(chunk)]
        return torch.cat(ids)


def quantise(quantizer: Quantizer, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each feature by its nearest code; gradients pass straight through.

    Shapes: features (batch, dim, h, w) -> codes (batch, dim, h, w), ids (batch, h, w), commitment loss ().
    """
    rows = rearrange(features.detach(), "b c h w -> (b h w) c")
    ids = rearrange(quantizer.nearest(rows), "(b h w) -> b h w", b=features.shape[0], h=features.shape[2])
    codes = rearrange(quantizer.embed(ids), "b h w c -> b c h w").to(features.dtype)
    commitment = F.mse_loss(features.float(), codes.float())
    return features + (codes - features).detach(), ids, commitment


@torch.no_grad()
def update_codebook(
    quantizer: Quantizer, features: Tensor, ids: Tensor, decay: float = 0.99, eps: float = 1e-5
) -> None:
    """Move every code towards the mean of the features that chose it. Shapes: features (rows, dim), ids (rows,)."""
    num_codes = quantizer.embed.num_embeddings
    features = features.float()
    counts = torch.bincount(ids, minlength=num_codes).to(features)
    sums = torch.zeros_like(quantizer.embed_avg).index_add_(0, ids, features)
    if _is_distributed():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    quantizer.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
    quantizer.embed_avg.mul_(decay).add_(sums, alpha=1 - decay)
    total = quantizer.cluster_size.sum()
    # smoothed, so that a code not chosen for a long time does not divide by zero
    smoothed = (quantizer.cluster_size + eps) / (total + num_codes * eps) * total
    quantizer.embed.weight.copy_(quantizer.embed_avg / smoothed[:, None])


@torch.no_grad()
def revive_dead_codes(
    quantizer: Quantizer, features: Tensor, generator: torch.Generator, threshold: float = 0.03
) -> int:
    """Move codes chosen less than `threshold` times per batch (EMA) onto features of this batch; returns how many.

    Features are drawn without replacement, more often the farther they are from their code, where codes are missing.
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
        counts = torch.bincount(ids, minlength=num_codes).to(features)
        sums = torch.zeros_like(quantizer.embed_avg).index_add_(0, ids, features)
        used = counts > 0
        quantizer.embed.weight[used] = sums[used] / counts[used, None]
    codes = quantizer.embed.weight.clone()
    if _is_distributed():
        dist.broadcast(codes, src=0)
    _set_codes(quantizer, torch.arange(num_codes), codes, cluster_size=1.0)


def codebook_usage(ids: Tensor, num_codes: int) -> tuple[float, float]:
    """Fraction of codes that occur in `ids`, and the perplexity of their distribution (1 to num_codes)."""
    counts = torch.bincount(ids.flatten(), minlength=num_codes).double()
    p = counts / counts.sum().clamp(min=1)
    perplexity = torch.exp(-torch.xlogy(p, p).sum())
    return float((counts > 0).double().mean()), float(perplexity)


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw row indices without replacement by weight, on the generator's device, which need not be the GPU."""
    return torch.multinomial((weights + 1e-12).to(generator.device), count, generator=generator)


def _set_codes(quantizer: Quantizer, which: Tensor, codes: Tensor, cluster_size: float) -> None:
    quantizer.embed.weight[which] = codes.to(quantizer.embed.weight.dtype)
    quantizer.cluster_size[which] = cluster_size
    quantizer.embed_avg[which] = codes * cluster_size


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
