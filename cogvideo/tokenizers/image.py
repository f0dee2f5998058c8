"""Images in [0, 1] to flat rows of token ids and back: the VQ-VAE at one compress rate, with its normalisation.

A saved tokenizer is a folder of `config.json` and `model.safetensors`. Not here: the network (`vqvae.py`).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor

from cogvideo.config import from_dict, to_dict
from cogvideo.files import atomic_directory, read_json, write_json
from cogvideo.tensor_file import read_tensors
from cogvideo.tokenizers import icetk
from cogvideo.tokenizers.vqvae import VQVAE, VQVAEConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """The network, the level it is used at, and the normalisation of pixels; defaults are the published values."""

    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    level: int = 1  # of vqvae.levels; CogVideo works at compress rate 8
    pixel_mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)
    pixel_std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)

    def __post_init__(self) -> None:
        if self.level not in self.vqvae.levels:
            raise ValueError(f"image tokenizer: level={self.level} is not among vqvae.levels={list(self.vqvae.levels)}")
        if not all(math.isfinite(s) and s > 0 for s in self.pixel_std):
            raise ValueError(f"image tokenizer: pixel_std={self.pixel_std} must be above zero")


class ImageTokenizer:
    """Shapes: images (batch, 3, height, width) in [0, 1]; ids (batch, rows * columns) int64, row by row."""

    def __init__(self, config: ImageTokenizerConfig, model: VQVAE | None = None) -> None:
        self.config = config
        self.model = VQVAE(config.vqvae) if model is None else model
        self._mean_std = torch.tensor([config.pixel_mean, config.pixel_std])[..., None, None]

    @property
    def num_tokens(self) -> int:
        return self.config.vqvae.num_codes

    @property
    def compress_rate(self) -> int:
        """Side of one token in pixels."""
        return self.config.vqvae.compress_rate(self.config.level)

    @property
    def codebook(self) -> Tensor:
        """(num_tokens, embedding_dim), detached."""
        return self.model.quantize.embed.weight.detach()

    @property
    def device(self) -> torch.device:
        return self.model.quantize.embed.weight.device

    def normalise(self, images: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (images.to(self.device, torch.float32) - mean) / std

    def denormalise(self, pixels: Tensor) -> Tensor:
        mean, std = self._statistics()
        return pixels.float() * std + mean

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Images to ids. Raises: ValueError for no images, or a shape that the compress rate does not divide."""
        if not len(images):
            raise ValueError("image tokenizer: no images to encode")
        model = self.model.eval()
        ids = [model.encode(self.normalise(chunk), self.config.level) for chunk in images.split(batch_size)]
        return rearrange(torch.cat(ids), "b h w -> b (h w)")

    @torch.no_grad()
    def decode(self, ids: Tensor, rows: int | None = None, batch_size: int = 64) -> Tensor:
        """Ids to images clamped to [0, 1]. Without `rows` (of tokens) the images are square.

        Raises: ValueError for ids outside the codebook, or a number of ids that `rows` does not divide.
        """
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"image tokenizer: ids have shape {tuple(ids.shape)}, expected (batch, tokens)")
        length = ids.shape[1]
        columns = math.isqrt(length) if rows is None else length // max(rows, 1)
        rows = columns if rows is None else rows
        if rows < 1 or rows * columns != length:
            raise ValueError(f"image tokenizer: {length} ids per image do not fill {rows} rows; give `rows`")
        grids = rearrange(ids.to(self.device), "b (h w) -> b h w", h=rows)
        model = self.model.eval()
        pixels = [model.decode(chunk, self.config.level) for chunk in grids.split(batch_size)]
        return self.denormalise(torch.cat(pixels)).clamp(0, 1)

    def save(self, path: Path | str, *, dtype: torch.dtype = torch.float32, replace: bool = False) -> None:
        """Write the folder atomically. The codebook's running averages are included, so training can be resumed."""
        state = self.model.state_dict()
        weights = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in state.items()}
        with atomic_directory(path, replace=replace) as folder:
            write_json(folder / CONFIG_FILE, to_dict(self.config))
            # not save_file, which loses the reason for a failure and creates files that only their owner can read
            (folder / WEIGHTS_FILE).write_bytes(save(weights))

    @classmethod
    def load(cls, directory: Path | str) -> "ImageTokenizer":
        """Read a saved folder; weights become float32.

        Raises: OSError for a missing file; ValueError for a config or weights that are damaged or do not fit.
        """
        folder = Path(directory)
        config = from_dict(
            ImageTokenizerConfig, read_json(folder / CONFIG_FILE, dict[str, Any]), origin=str(folder / CONFIG_FILE)
        )
        with torch.device("meta"):
            model = VQVAE(config.vqvae)
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; an image tokenizer consists of {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
        load_weights(model, read_tensors(path), origin=str(path))
        return cls(config, model)

    def _statistics(self) -> Tensor:
        """Mean and standard deviation of pixels, (2, 3, 1, 1); copied once to wherever the model is."""
        if self._mean_std.device != self.device:
            self._mean_std = self._mean_std.to(self.device)
        return self._mean_std


def check_same_codes(tokenizer: ImageTokenizer, high_res: ImageTokenizer) -> None:
    """Raises: ValueError if one model cannot read the tokens of both, because their numbers of codes differ."""
    if high_res.num_tokens != tokenizer.num_tokens:
        raise ValueError(
            f"the image tokenizer of large frames has {high_res.num_tokens} codes, the other one "
            f"{tokenizer.num_tokens}; use two with the same number of codes"
        )


def open_image_tokenizer(path: Path | str) -> ImageTokenizer:
    """Open a saved folder, or the published weights: `ice_image.pt`, its folder, or the word `icetk`.

    The published tokenizer is used at compress rate 8, as in CogVideo.
    Raises: OSError, or ValueError in one line, if it is missing or damaged.
    """
    folder = icetk.icetk_folder(Path(path), icetk.IMAGE_FILE)
    return ImageTokenizer.load(path) if folder is None else load_icetk_image(folder)


def image_tokenizer_files(path: Path | str) -> list[Path]:
    """The files that decide which tokens an image becomes, for hashing; `path` as for `open_image_tokenizer`."""
    folder = icetk.icetk_folder(Path(path), icetk.IMAGE_FILE)
    if folder is not None:
        return [folder.expanduser() / icetk.IMAGE_FILE]
    return [Path(path) / CONFIG_FILE, Path(path) / WEIGHTS_FILE]


def load_icetk_image(
    folder: Path | str = icetk.DEFAULT_FOLDER, compress_rate: int = 8, config: VQVAEConfig | None = None
) -> ImageTokenizer:
    """The published image tokenizer at one of its compress rates; the weights of the others are loaded but not used.

    Raises: FileNotFoundError that says what to put where; ValueError for a file that is not these weights.
    """
    path = icetk.find_icetk_file(folder, icetk.IMAGE_FILE)
    config = VQVAEConfig() if config is None else config
    level = config.level_of_rate(compress_rate)
    weights = icetk.read_image_weights(path)
    with torch.device("meta"):
        model = VQVAE(config)
    load_weights(model, weights, origin=str(path))
    return ImageTokenizer(ImageTokenizerConfig(vqvae=config, level=level), model)


def load_weights(model: VQVAE, weights: dict[str, Tensor], origin: str) -> None:
    """Assign tensors to a model built on the meta device, as float32; every name and shape must match exactly.

    Raises: ValueError that names the first tensor that does not fit.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise ValueError(f"{origin}: tensor {name} is missing; the file does not fit this image tokenizer")
        if name not in expected:
            raise ValueError(f"{origin}: tensor {name} is not part of this image tokenizer")
        got, want = weights[name], expected[name]
        if got.shape != want.shape or not got.is_floating_point():
            raise ValueError(
                f"{origin}: tensor {name} is {got.dtype} {tuple(got.shape)}, expected floats {tuple(want.shape)}"
            )
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in weights.items()}, assign=True)
    model.quantize.embed.weight.requires_grad_(False)
