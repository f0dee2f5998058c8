"""Super-resolution with CogView2's models: the direct model draws all fine tokens, the iterative one redraws some.

    fine = draw_fine(direct, text, mask, coarse, token_sampler, uniforms)             # (frames, 3600), one forward pass
    for number, token_sampler in enumerate(top_k_samplers(codes, device), 1):         # six more
        fine = redraw(iterative, text, mask, fine, number, token_sampler, uniforms)

Each frame is drawn independently, as published: consistency in time comes only from the coarse frames and, with
`noise=shared`, from random numbers that all frames of a clip share.

A pass over large frames takes gigabytes, so threads take turns on a device, each for one batch or one call of `decode`.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvideo.checkpoint.adapter import model_name
from cogvideo.checkpoint.format import MANIFEST, Checkpoint, load_checkpoint
from cogvideo.checkpoint.load import build_superres
from cogvideo.config import load_config, to_dict
from cogvideo.distributed import open_device
from cogvideo.files import BUNDLED_WEIGHTS, sha256_file
from cogvideo.hub import resolve
from cogvideo.inference.engine import Progress, with_kept_memory_released
from cogvideo.inference.sampler import PUBLISHED_CLUSTERS, ClusterSampler, TokenSampler, kmeans_labels
from cogvideo.rng import SampleKey, sample_uniforms
from cogvideo.sampling.adapters import AdapterChoice, AdapterSet
from cogvideo.sampling.bundle import (
    SUPERRES,
    check_tokenizers,
    load_upsample_config,
    open_high_res_tokenizer,
    open_tokenizers,
    own_settings,
    own_tokenizers,
    place_model,
    read_config,
)
from cogvideo.sampling.config import ROUND_TOP_K, SampleAndUpsampleConfig, SampleConfig, UpsampleConfig
from cogvideo.sampling.pipeline import BatchCache, check_cached, decode_frames
from cogvideo.sampling.prompts import prompt_keys
from cogvideo.sequence.prompt import Encode
from cogvideo.superres.batch import pad_captions
from cogvideo.superres.grid import redraw_mask
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.text import normalise
from cogvideo.tokenizers.image import ImageTokenizer

FIRST_ROUND = 1000
"""Round number of the direct model in the keys of its random numbers; the iterative model's rounds follow."""
INHERITED = ("seed", "weights", "device", "stream_layers")
"""Settings that super-resolution inherits from the clips' when both are configured together."""
ROWS_PER_CHUNK = 1024
"""Rows whose logits are computed at once; for all 3,600 rows they would take 288 MB per frame."""


class Turns:
    """A lock that goes to a waiting thread before its last holder can retake it; `threading.Lock` promises no order."""

    def __init__(self) -> None:
        self._next, self._current = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._current.acquire()

    def __exit__(self, *error: object) -> None:
        self._current.release()


_TURNS: dict[torch.device, Turns] = {}
"""Held by the thread that computes large frames on a device."""


@torch.inference_mode()
def draw_fine(
    model: SuperresTransformer,
    text: Tensor,
    text_mask: Tensor,
    low_res: Tensor,
    token_sampler: TokenSampler,
    uniforms: Tensor,
) -> Tensor:
    """Draw all tokens of the fine grid at once with the direct model.

    Shapes: text, text_mask as returned by `pad_captions`, one row per frame; low_res (frames, low_res_len); uniforms
    (frames, high_res_len, 2); returns (frames, high_res_len).
    """
    assert model.config.method == "direct"
    queries = torch.full((len(low_res), model.config.high_res_len), model.config.vocabulary.start_of_image)
    hidden = model(text, text_mask, low_res, queries.to(low_res.device))
    return _draw(model, hidden, token_sampler, uniforms)


@torch.inference_mode()
def redraw(
    model: SuperresTransformer,
    text: Tensor,
    text_mask: Tensor,
    tokens: Tensor,
    number: int,
    token_sampler: TokenSampler,
    uniforms: Tensor,
    only: Tensor | None = None,
) -> Tensor:
    """Redraw the tokens of one round with the iterative model; `number` counts from 1, see `superres.grid`.

    Shapes: text, text_mask as returned by `pad_captions`, one row per frame; tokens (frames, high_res_len), not
    modified; uniforms (frames, high_res_len, 2); only (high_res_len,) bool, on the CPU, positions that may change
    (default: all); returns (frames, high_res_len).
    """
    config = model.config
    assert config.method == "iterative"
    changing = redraw_mask(config.high_res_side, number)
    changing = changing if only is None else changing & only
    positions = changing.nonzero().squeeze(1).to(tokens.device)
    inputs = tokens.index_fill(1, positions, config.vocabulary.start_of_image)
    hidden = model(text, text_mask, tokens[:, :0], inputs)
    drawn = _draw(model, hidden[:, positions], token_sampler, uniforms[:, positions])
    return tokens.index_copy(1, positions, drawn)


def top_k_samplers(
    num_tokens: int, device: torch.device, round_top_k: Sequence[int] = ROUND_TOP_K
) -> list[TokenSampler]:
    """The token sampler of each round: plain top-k at temperature 1."""
    return [ClusterSampler(np.arange(num_tokens), 1.0, top_k, 1.0).to(device) for top_k in round_top_k]


def _draw(model: SuperresTransformer, hidden: Tensor, token_sampler: TokenSampler, uniforms: Tensor) -> Tensor:
    chunks = zip(hidden.split(ROWS_PER_CHUNK, dim=1), uniforms.split(ROWS_PER_CHUNK, dim=1), strict=True)
    return torch.cat([token_sampler(model.logits(rows), numbers) for rows, numbers in chunks], dim=1)


@dataclass(frozen=True)
class Upsampler:
    """The super-resolution models, the tokenizers they share with a bundle, and their settings."""

    direct: SuperresTransformer
    iterative: SuperresTransformer | None
    image_tokenizer: ImageTokenizer
    """Of the small frames that are read."""
    high_res_tokenizer: ImageTokenizer
    """Of the large frames that are drawn; the same one unless the bundle has another for them."""
    encode: Encode
    labels: np.ndarray
    """(num_codes,) cluster of each code of `high_res_tokenizer`."""
    config: UpsampleConfig
    fingerprints: tuple[str, ...] = ()
    """SHA-256 of the models' manifests."""

    @classmethod
    def load(cls, directory: Path | str | None = None, config: UpsampleConfig | None = None) -> "Upsampler":
        """Open a bundle's super-resolution models.

        `directory` is as for `Pipeline.load`; `config` defaults to the bundle's own settings.
        Raises: as `find_models` and `open_upsampler`; OSError as `hub.resolve`.
        """
        bundle = resolve(directory or BUNDLED_WEIGHTS)
        return open_upsampler(bundle, *find_models(bundle, None, None), config or load_upsample_config(bundle, [], []))

    def upsample(self, tokens: Tensor, prompts: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Upsample what `Pipeline.sample` returned for these prompts.

        Shapes: tokens (clips, K, low_res_len); returns (clips, K, high_res_len), on the CPU.
        Raises: ValueError for an empty prompt, frames of another size, or unequal numbers of clips per prompt.
        """
        if tokens.shape[2:] != (self.direct.config.low_res_len,):
            raise ValueError(
                f"tokens have shape {list(tokens.shape)}; expected (clips, frames, {self.direct.config.low_res_len})"
            )
        samples_per_prompt, rest = divmod(len(tokens), max(len(prompts), 1))
        if rest or not samples_per_prompt or not prompts:
            raise ValueError(
                f"{len(tokens)} clips cannot be divided among {len(prompts)} prompts; give the prompts that they were "
                "sampled from"
            )
        keys = prompt_keys(self.config.seed, prompts, samples_per_prompt)
        encoded = [self.encode_caption(key.caption) for key in keys]
        return self.upsample_clips(tokens, keys, encoded, range(len(keys)), progress=progress)

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Decode large frames (..., high_res_len) to pixels (..., height, width, 3) uint8."""
        with self._turn:
            return decode_frames(self.high_res_tokenizer, tokens)

    @property
    def tokens_per_frame(self) -> int:
        return self.direct.config.high_res_len

    @property
    def _turn(self) -> Turns:
        return _TURNS.setdefault(self.direct.final_layernorm.weight.device, Turns())

    @cached_property
    def _token_samplers(self) -> list[TokenSampler]:
        """The direct model's, then one per round of the iterative model."""
        config, device = self.config, self.direct.final_layernorm.weight.device
        clusters = ClusterSampler(self.labels, config.temperature, config.top_k_clusters, config.token_temperature)
        return [clusters.to(device), *top_k_samplers(len(self.labels), device, config.round_top_k)]

    def encode_caption(self, caption: str) -> list[int]:
        """Token ids of a caption; both models read it without any suffix."""
        return self.encode(normalise(caption))

    def upsample_clips(
        self,
        frames: Tensor,
        keys: Sequence[SampleKey],
        prompts: Sequence[list[int]],
        clips: Sequence[int],
        cache: BatchCache | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Upsample the clips with these indices, `frames_at_once` frames in a batch.

        Shapes: frames (all clips, K, low_res_len); returns (len(clips), K, high_res_len), on the CPU.
        `keys` and `prompts` (from `encode_caption`): one per clip.
        """
        upsampled = []
        for clip in clips:
            for first in range(0, frames.shape[1], self.config.frames_at_once):
                numbers = range(first, min(first + self.config.frames_at_once, frames.shape[1]))
                name = f"fine-{clip:06d}-{first:06d}"
                batch = None if cache is None else cache.load(name)
                if batch is not None:
                    shape = (len(numbers), self.tokens_per_frame)
                    check_cached(batch, name, shape, self.high_res_tokenizer.num_tokens)
                else:
                    some = frames[clip, numbers.start : numbers.stop]
                    with self._turn:
                        if progress is not None:
                            progress(0)  # may raise, to cancel work that waited for its turn
                        batch = with_kept_memory_released(
                            self.direct.final_layernorm.weight.device,
                            partial(self.upsample_frames, some, keys[clip], prompts[clip], numbers),
                        )
                    if cache is not None:
                        cache.store(name, batch)
                if progress is not None:
                    progress(len(numbers) * self.tokens_per_frame)
                upsampled.append(batch)
        return torch.cat(upsampled).view(len(clips), frames.shape[1], self.tokens_per_frame)

    def upsample_frames(self, frames: Tensor, key: SampleKey, prompt: list[int], numbers: range) -> Tensor:
        """Upsample some frames of one clip: (frames, low_res_len) -> (frames, high_res_len), on the CPU.

        `numbers` are the frames' indices in the clip, part of the key of their random numbers.
        """
        device = self.direct.final_layernorm.weight.device

        def uniforms(number: int) -> Tensor:
            shared = self.config.noise == "shared"  # every frame then has the numbers of the first
            drawn = sample_uniforms([key], FIRST_ROUND + number, (0,) if shared else numbers, self.tokens_per_frame)[0]
            return drawn.expand(len(numbers), -1, -1).to(device)

        def text(model: SuperresTransformer) -> tuple[Tensor, Tensor]:
            rows, mask = pad_captions([prompt] * len(frames), model.config)
            return rows.to(device), mask.to(device)

        fine = draw_fine(self.direct, *text(self.direct), frames.to(device), self._token_samplers[0], uniforms(0))
        if self.iterative is not None:
            for number, token_sampler in enumerate(self._token_samplers[1:], 1):
                fine = redraw(self.iterative, *text(self.iterative), fine, number, token_sampler, uniforms(number))
        return fine.cpu()


def own_models(bundle: Path) -> dict[str, Path]:
    """Folders of those super-resolution models, `direct` and `iterative`, that a bundle has."""
    return {method: bundle / folder for method, folder in SUPERRES.items() if (bundle / folder).is_dir()}


def find_models(bundle: Path, direct: Path | None, iterative: Path | None) -> tuple[Path, Path | None]:
    """Folders of the direct and the iterative model: those given, or the bundle's own if no direct one is given.

    Raises: ValueError if there is no direct model.
    """
    if direct is not None:
        return direct, iterative
    own = own_models(bundle)
    if "direct" not in own:
        raise ValueError(
            f"{bundle} has no direct super-resolution model of its own; add one with `cogvideo bundle --direct DIR`, "
            "or give --direct DIR to `cogvideo upsample` or `cogvideo demo`"
        )
    return own["direct"], iterative or own.get("iterative")


def load_both_configs(
    directory: Path, files: list[Path], overrides: list[str], *, own_models: bool = True
) -> tuple[SampleConfig, UpsampleConfig]:
    """`load_sample_config`, and the settings of super-resolution from the group `upsample`.

    `own_models`: whether the bundle's own models are used; its settings of super-resolution apply only to those.
    """
    stored = own_settings(directory)
    clips, upsample = load_config(SampleAndUpsampleConfig, files, overrides, stored=stored, derive=_inherited).split()
    if not own_models:
        inherited = _inherited(to_dict(clips))
        upsample = load_config(SampleAndUpsampleConfig, files, overrides, derive=lambda given: inherited).split()[1]
    return clips, upsample


def _inherited(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that super-resolution inherits from those of the clips."""
    return {"upsample": {name: given[name] for name in INHERITED if name in given}}


def open_upsampler(
    bundle: Path,
    direct: Path,
    iterative: Path | None,
    config: UpsampleConfig,
    adapters: Sequence[AdapterChoice] = (),
) -> Upsampler:
    """Open the super-resolution models with the tokenizers of a bundle, and merge adapters into their weights.

    The iterative model is left out if `config.round_top_k` has no rounds.
    Raises: FileNotFoundError; ValueError, in one line, for parts that are damaged or do not belong together.
    """
    device = open_device(config.device)
    read_config(bundle)
    text_tokenizer, image_tokenizer, labels = open_tokenizers(bundle)
    large = open_high_res_tokenizer(bundle, image_tokenizer)
    high_res_tokenizer, labels = (image_tokenizer, labels) if large is None else large
    own = own_tokenizers(bundle, text_tokenizer, image_tokenizer, None if large is None else high_res_tokenizer)
    models: dict[str, SuperresTransformer] = {}
    checkpoints: dict[str, Checkpoint] = {}
    for method, folder in (("direct", direct), ("iterative", iterative)):
        if folder is None or (method == "iterative" and not config.round_top_k):
            continue
        checkpoint = load_checkpoint(folder)
        model = build_superres(checkpoint)
        known = model.config.vocabulary
        if model.config.method != method:
            raise ValueError(f"--{method} {folder} holds the {model.config.method} model; give the other one")
        vocabulary = replace(text_tokenizer.vocabulary, size=known.size)
        if image_tokenizer.num_tokens != known.num_image_tokens or vocabulary != known:
            raise ValueError(f"{folder} and the tokenizers of {bundle} do not belong together; use one family")
        check_tokenizers(checkpoint, own, f"--{method} {folder}", f"the bundle {bundle}")
        place_model(model, config.weights, device, offload=config.stream_layers)
        models[method], checkpoints[method] = model, checkpoint
    if len({model.config.high_res_side for model in models.values()}) > 1:
        raise ValueError(f"{direct} and {iterative} have grids of different sizes; use models of one family")
    if adapters:
        names = {method: model_name(model.config) for method, model in models.items()}
        chosen = AdapterSet(
            {names[method]: model for method, model in models.items()},
            {names[method]: checkpoint for method, checkpoint in checkpoints.items()},
        )
        for number, adapter in enumerate(adapters):
            chosen.add(str(number), adapter.folder)
        chosen.set({str(number): adapter.scale for number, adapter in enumerate(adapters)}, merge=True)
    for tokenizer in (image_tokenizer, high_res_tokenizer):
        tokenizer.model.to(device)
    if labels is None or config.num_clusters is not None:
        codebook = high_res_tokenizer.codebook.detach().float().cpu().numpy()
        labels = kmeans_labels(codebook, config.num_clusters or min(PUBLISHED_CLUSTERS, len(codebook)))
    folders = [folder for folder in (direct, iterative) if folder is not None]
    return Upsampler(
        models["direct"],
        models.get("iterative"),
        image_tokenizer,
        high_res_tokenizer,
        text_tokenizer.encode,
        labels,
        config,
        tuple(sha256_file(folder / MANIFEST) for folder in folders),
    )
