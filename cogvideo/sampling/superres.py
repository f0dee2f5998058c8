"""Drawing fine frames from coarse ones with CogView2's super-resolution: the direct model, then rounds of redrawing.

    fine = draw_fine(direct, text, mask, coarse, draw, uniforms)          # (frames, 3600), one forward
    for number, draw in enumerate(plain_draws(codes, device), 1):         # six more
        fine = redraw(iterative, text, mask, fine, number, draw, uniforms)

Frames are drawn each for itself, as published: nothing holds them together in time but the coarse ones.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogvideo.checkpoint.format import MANIFEST, load_checkpoint
from cogvideo.checkpoint.load import build_superres
from cogvideo.distributed import open_device
from cogvideo.files import sha256_file
from cogvideo.inference.clusters import PUBLISHED_CLUSTERS, kmeans_labels
from cogvideo.inference.sampler import ClusterDraw, Draw
from cogvideo.model.quantize import convert_weights, stream_layers
from cogvideo.rng import SampleKey, sample_uniforms
from cogvideo.sampling.bundle import ACTIVATIONS, SUPERRES, open_tokenizers
from cogvideo.sampling.config import UpsampleConfig
from cogvideo.sequence.prompt import Encode
from cogvideo.superres.batch import pad_captions
from cogvideo.superres.grid import ROUND_TOP_K, redraw_mask
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.tokenizers.image import ImageTokenizer

STREAM = 1000
"""Where the random numbers of super-resolution begin, among rounds: the direct model's, then each round's."""
ROWS_AT_ONCE = 1024
"""Places whose scores are held at once: of all 3,600 they would take 288 MB a frame."""


@torch.inference_mode()
def draw_fine(
    model: SuperresTransformer, text: Tensor, text_mask: Tensor, low_res: Tensor, draw: Draw, uniforms: Tensor
) -> Tensor:
    """All tokens of the fine grid at once, by the direct model.

    Shapes: text, text_mask as of `pad_captions`, a row a frame; low_res (frames, low_res_len); uniforms (frames,
    high_res_len, 2) -> (frames, high_res_len).
    """
    assert model.config.method == "direct"
    asked = torch.full((len(low_res), model.config.high_res_len), model.config.vocabulary.start_of_image)
    return _draw(model, model(text, text_mask, low_res, asked.to(low_res.device)), draw, uniforms)


@torch.inference_mode()
def redraw(
    model: SuperresTransformer,
    text: Tensor,
    text_mask: Tensor,
    tokens: Tensor,
    number: int,
    draw: Draw,
    uniforms: Tensor,
    only: Tensor | None = None,
) -> Tensor:
    """One round of the iterative model over fine frames: a forward, and new tokens where the round redraws.

    Shapes: text, text_mask as of `pad_captions`, a row a frame; tokens (frames, high_res_len), which stay as they are;
    uniforms (frames, high_res_len, 2); only (high_res_len,) bool: places that may change (default: all)
    -> (frames, high_res_len). `number` counts from 1, see `superres.rounds`.
    """
    config = model.config
    assert config.method == "iterative"
    asked = redraw_mask(config.high_res_side, number).to(tokens.device)
    asked = asked if only is None else asked & only
    places = asked.nonzero().squeeze(1)
    inputs = tokens.masked_fill(asked, config.vocabulary.start_of_image)
    hidden = model(text, text_mask, tokens[:, :0], inputs)
    return tokens.index_copy(1, places, _draw(model, hidden[:, places], draw, uniforms[:, places]))


def plain_draws(num_tokens: int, device: torch.device) -> list[Draw]:
    """What the rounds draw by: plain top-k sampling at temperature 1."""
    return [ClusterDraw(np.arange(num_tokens), 1.0, top_k, 1.0).to(device) for top_k in ROUND_TOP_K]


def _draw(model: SuperresTransformer, hidden: Tensor, draw: Draw, uniforms: Tensor) -> Tensor:
    parts = zip(hidden.split(ROWS_AT_ONCE, dim=1), uniforms.split(ROWS_AT_ONCE, dim=1), strict=True)
    return torch.cat([draw(model.logits(rows), numbers) for rows, numbers in parts], dim=1)


@dataclass(frozen=True)
class Upsampler:
    """The models and all that they are used with."""

    direct: SuperresTransformer
    iterative: SuperresTransformer | None
    image_tokenizer: ImageTokenizer
    encode: Encode
    labels: np.ndarray
    config: UpsampleConfig
    fingerprints: tuple[str, ...] = ()
    """Of the models, to be told apart by."""

    @property
    def tokens_a_frame(self) -> int:
        return self.direct.config.high_res_len

    @cached_property
    def _draws(self) -> list[Draw]:
        config, device = self.config, self.direct.final_layernorm.weight.device
        clusters = ClusterDraw(self.labels, config.temperature, config.top_k_clusters, config.token_temperature)
        return [clusters.to(device), *plain_draws(len(self.labels), device)]

    def __call__(self, frames: Tensor, key: SampleKey, numbers: range) -> Tensor:
        """Fine frames of one clip: (frames, low_res_len) -> (frames, high_res_len), on the CPU.

        `numbers` say which frames of the clip they are, for their random numbers.
        """
        device, ids = self.direct.final_layernorm.weight.device, self.encode(" ".join(key.caption.split()))

        def random(stream: int) -> Tensor:
            return sample_uniforms([key], STREAM + stream, numbers, self.tokens_a_frame)[0].to(device)

        def text(model: SuperresTransformer) -> tuple[Tensor, Tensor]:
            rows, mask = pad_captions([ids] * len(frames), model.config)
            return rows.to(device), mask.to(device)

        fine = draw_fine(self.direct, *text(self.direct), frames.to(device), self._draws[0], random(0))
        if self.iterative is not None:
            for number, draw in enumerate(self._draws[1:], 1):
                fine = redraw(self.iterative, *text(self.iterative), fine, number, draw, random(number))
        return fine.cpu()


def find_models(bundle: Path, direct: Path | None, iterative: Path | None) -> tuple[Path, Path | None]:
    """The direct model's folder and the iterative one's: those given, or without a direct one the bundle's.

    Raises: ValueError if there is no direct model.
    """
    if direct is not None:
        return direct, iterative
    own = {method: bundle / folder for method, folder in SUPERRES.items() if (bundle / folder).is_dir()}
    if "direct" not in own:
        raise ValueError(f"{bundle} has no direct super-resolution model of its own; give --direct DIR")
    return own["direct"], iterative or own.get("iterative")


def open_upsampler(bundle: Path, direct: Path, iterative: Path | None, config: UpsampleConfig) -> Upsampler:
    """Raises: FileNotFoundError; ValueError, in one line, for what is damaged or does not belong together."""
    device = open_device(config.device)
    text, image, labels = open_tokenizers(bundle)
    models = {}
    for method, place in (("direct", direct), ("iterative", iterative)):
        if place is None:
            continue
        model = build_superres(load_checkpoint(place))
        known = model.config.vocabulary
        if model.config.method != method:
            raise ValueError(f"--{method} {place} holds the {model.config.method} model; give the other one")
        if image.num_tokens != known.num_image_tokens or replace(text.vocabulary, size=known.size) != known:
            raise ValueError(f"{place} and the tokenizers of {bundle} do not belong together; use one family")
        convert_weights(model, config.weights, ACTIVATIONS[config.weights] if device.type != "cpu" else torch.float32)
        if config.stream_layers:
            stream_layers(model)
        models[method] = model.to(device)
    fine = {model.config.high_res_side for model in models.values()}
    if len(fine) > 1:
        raise ValueError(f"{direct} and {iterative} make grids of different sizes; use one family")
    image.model.to(device)
    if labels is None or config.num_clusters is not None:
        codebook = image.codebook.detach().float().cpu().numpy()
        labels = kmeans_labels(codebook, config.num_clusters or min(PUBLISHED_CLUSTERS, len(codebook)))
    places = [place for place in (direct, iterative) if place is not None]
    return Upsampler(
        models["direct"],
        models.get("iterative"),
        image,
        text.encode,
        labels,
        config,
        tuple(sha256_file(place / MANIFEST) for place in places),
    )
