"""The hierarchical VQ-VAE of the image tokenizer: pixels to code ids and back at rates 4, 8 and 16.

Structure and parameter names are those of CogVideo's published image tokenizer; the defaults of `VQVAEConfig` are the
published sizes. The network works on normalised pixels. Not here: normalisation and files (`image.py`), the loss and
the training of the codebook (`quantise.py`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CHUNK_ROWS = 4096
"""Vectors that are compared with the whole codebook at once."""


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of the network. Level l compresses by 2 ** (encoder downsamplings + l): 4, 8, 16 by default."""

    channels: int = 128  # width at full resolution
    channel_multipliers: tuple[int, ...] = (1, 2, 4)  # the encoder's widths, from full resolution down
    encoder_num_res_blocks: int = 2  # residual blocks per resolution
    decoder_num_res_blocks: int = 0  # the decoder has one more than this per resolution, as published
    z_channels: int = 256  # width of the encoder's output
    embedding_dim: int = 256  # width of a code
    num_codes: int = 20000
    num_levels: int = 3  # of the whole hierarchy; sets parameter names: level l has decoder decs.{num_levels - 1 - l}
    levels: tuple[int, ...] = (0, 1, 2)  # the levels that are built, with their downsamplers and decoders
    norm_groups: int = 32
    # image: GroupNorm, as published; its statistics make every code depend on the whole image. pixel: over the channels
    # of each position, so that codes are local and a plain background needs few of them.
    norm_scope: Literal["image", "pixel"] = "image"
    mid_attention: bool = True  # attention between the two middle blocks; off keeps tokens local
    nominal_resolution: int = 256  # attention_resolutions are relative to this image side, whatever the real side is
    attention_resolutions: tuple[int, ...] = (16,)  # decoder resolutions with attention after each block

    def __post_init__(self) -> None:
        for name, low, high in (
            *((name, 1, 1 << 16) for name in ("channels", "z_channels", "embedding_dim", "norm_groups")),
            *((name, 0, 64) for name in ("encoder_num_res_blocks", "decoder_num_res_blocks")),
            ("num_codes", 1, 1 << 24),
            ("num_levels", 1, 16),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"vqvae.{name}={getattr(self, name)}; expected {low} to {high}")
        if not 1 <= len(self.channel_multipliers) <= 16 or any(not 1 <= m <= 64 for m in self.channel_multipliers):
            raise ValueError(
                f"vqvae.channel_multipliers={self.channel_multipliers}; expected 1 to 16 numbers, each from 1 to 64"
            )
        if not self.levels or any(not 0 <= level < self.num_levels for level in self.levels):
            raise ValueError(f"vqvae.levels={self.levels}; expected some of 0..{self.num_levels - 1}")
        widths = {self.channels * multiplier for multiplier in self.channel_multipliers} | {self.channels}
        for width in sorted(widths):
            if width % self.norm_groups:
                raise ValueError(
                    f"vqvae.norm_groups={self.norm_groups} does not divide a width of {width}; choose a divisor"
                )

    @property
    def encoder_rate(self) -> int:
        """Side in pixels of one cell of the encoder's output (level 0)."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def compress_rate(self, level: int) -> int:
        return self.encoder_rate * 2**level

    def level_of_rate(self, rate: int) -> int:
        for level in range(self.num_levels):
            if self.compress_rate(level) == rate:
                return level
        rates = [self.compress_rate(level) for level in range(self.num_levels)]
        raise ValueError(f"the image tokenizer has no compress rate {rate}; choose one of {rates}")

    def decoder_multipliers(self, level: int) -> tuple[int, ...]:
        return (1,) * level + tuple(self.channel_multipliers)


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel. Shapes: (batch, channels, h, w), in and out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(channels: int, config: VQVAEConfig) -> nn.Module:
    if config.norm_scope == "pixel":
        return PixelNorm(channels, eps=1e-6)
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: VQVAEConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, config)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = make_norm(out_channels, config)
        self.conv2 = conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut: Tensor = self.nin_shortcut(x)
        return shortcut + h


class AttentionBlock(nn.Module):
    """Single-head attention over all positions of a feature map."""

    def __init__(self, channels: int, config: VQVAEConfig) -> None:
        super().__init__()
        self.norm = make_norm(channels, config)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        update: Tensor = self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=height))
        return x + update


class Middle(nn.Module):
    def __init__(self, channels: int, config: VQVAEConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, config)
        self.attn_1 = AttentionBlock(channels, config) if config.mid_attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """A stride-2 convolution, padded by one column on the right and one row at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResidualDownsample(nn.Module):
    """From one level of the hierarchy to the next: average pooling plus a learned correction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_down_sampler = Downsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, kernel_size=2, stride=2) + self.conv_down_sampler(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """The blocks at one resolution; encoder and decoder set `downsample` or `upsample`, under the published names."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, config: VQVAEConfig
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], config) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttentionBlock(out_channels, config) for _ in range(num_blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        blocks = config.encoder_num_res_blocks
        self.conv_in = conv3x3(3, config.channels)
        width = config.channels
        self.down = nn.ModuleList()
        for i, multiplier in enumerate(config.channel_multipliers):
            out_channels = config.channels * multiplier if blocks else width
            stage = Stage(width, out_channels, blocks, False, config)
            width = out_channels
            if i < len(config.channel_multipliers) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = Middle(width, config)
        self.norm_out = make_norm(width, config)
        self.conv_out = conv3x3(width, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: VQVAEConfig, level: int) -> None:
        super().__init__()
        multipliers = config.decoder_multipliers(level)
        width = config.channels * multipliers[-1]
        self.conv_in = conv3x3(config.embedding_dim, width)
        self.mid = Middle(width, config)
        stages = []
        for i in reversed(range(len(multipliers))):
            out_channels = config.channels * multipliers[i]
            attention = config.nominal_resolution // 2**i in config.attention_resolutions
            stage = Stage(width, out_channels, config.decoder_num_res_blocks + 1, attention, config)
            width = out_channels
            if i:
                stage.upsample = Upsample(width)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # up.0 is the full resolution and runs last
        self.norm_out = make_norm(width, config)
        self.conv_out = conv3x3(width, 3)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.mid(self.conv_in(codes))
        for stage in reversed(self.up):
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook, updated by `quantise.py` and never by gradients; the buffers hold its running averages."""

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


class VQVAE(nn.Module):
    """Normalised images (batch, 3, height, width) to ids (batch, height / rate, width / rate) and back."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.enc = Encoder(config)
        self.down_samplers = nn.ModuleList(ResidualDownsample(config.z_channels) for _ in range(max(config.levels)))
        self.quantize = Quantizer(config.z_channels, config.embedding_dim, config.num_codes)
        self.decs = nn.ModuleDict(
            {self._decoder_name(level): Decoder(config, level) for level in sorted(config.levels, reverse=True)}
        )

    def features(self, images: Tensor, level: int) -> Tensor:
        """The encoder's projected output, to be quantised: (batch, embedding_dim, height / rate, width / rate)."""
        self._check_level(level)
        rate = self.config.compress_rate(level)
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % rate or images.shape[3] % rate:
            raise ValueError(
                f"image tokenizer: images have shape {tuple(images.shape)}, expected (batch, 3, height, width) "
                f"with sides divisible by {rate}"
            )
        z = self.enc(images)
        for down_sampler in self.down_samplers[:level]:
            z = down_sampler(z)
        return self.quantize.proj(z)

    @torch.no_grad()
    def encode(self, images: Tensor, level: int) -> Tensor:
        z = self.features(images, level)
        ids = self.quantize.nearest(rearrange(z, "b c h w -> (b h w) c"))
        return rearrange(ids, "(b h w) -> b h w", b=z.shape[0], h=z.shape[2])

    def decode_codes(self, codes: Tensor, level: int) -> Tensor:
        """Code vectors (batch, embedding_dim, h, w) to normalised, unclamped pixels."""
        self._check_level(level)
        return self.decs[self._decoder_name(level)](codes)

    @torch.no_grad()
    def decode(self, ids: Tensor, level: int) -> Tensor:
        if ids.ndim != 3:
            raise ValueError(f"image tokenizer: ids have shape {tuple(ids.shape)}, expected (batch, height, width)")
        low, high = torch.stack(ids.aminmax()).tolist() if ids.numel() else (0, 0)
        if low < 0 or high >= self.config.num_codes:
            raise ValueError(f"image tokenizer: ids span {low}..{high}, expected 0..{self.config.num_codes - 1}")
        return self.decode_codes(rearrange(self.quantize.embed(ids), "b h w c -> b c h w"), level)

    def _decoder_name(self, level: int) -> str:
        return str(self.config.num_levels - 1 - level)

    def _check_level(self, level: int) -> None:
        if level not in self.config.levels:
            raise ValueError(f"image tokenizer: level {level} is not built; choose one of {list(self.config.levels)}")
