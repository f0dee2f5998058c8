"""Put trained parts together into one bundle folder, storing a trunk that several of them share only once."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.model_io import load_model, save_model
from cogvideo.config import dump_yaml, from_dict, load_config, to_dict
from cogvideo.files import atomic_directory, sha256_file, write_json
from cogvideo.model.config import ModelConfig
from cogvideo.model.transformer import is_temporal
from cogvideo.sampling.bundle import HASHED_FILES, BundleConfig, check_family
from cogvideo.sampling.clusters import kmeans_labels
from cogvideo.sampling.config import SampleConfig
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.tokenizers.open import open_image_tokenizer, open_text_tokenizer


@dataclass(frozen=True)
class Parts:
    """Where the parts of a bundle lie."""

    text_tokenizer: Path
    image_tokenizer: Path
    trunk: Path
    sequential: Path
    interpolation: Path
    sampling: Path | None = None
    """A YAML file of settings that suit these weights."""


def assemble_bundle(
    directory: Path, parts: Parts, *, config: BundleConfig, num_clusters: int, dtype: torch.dtype, replace: bool = False
) -> None:
    """Write a bundle that `open_bundle` reads. The folder appears whole or not at all.

    A stage whose trunk equals `parts.trunk` (it was trained frozen) is stored without it.
    Raises: FileExistsError if `directory` is there and `replace` is not set; ValueError for parts that are damaged or
    do not belong together.
    """
    if num_clusters < 1:
        raise ValueError(f"num_clusters={num_clusters}; expected at least 1")
    text_tokenizer = open_text_tokenizer(parts.text_tokenizer)  # fails here, not at the first prompt
    models: dict[str, ModelConfig] = {}
    if parts.sampling is not None:
        load_config(SampleConfig, [parts.sampling])
    with atomic_directory(directory, replace=replace) as building:
        text_tokenizer.save(building / "text.model")
        tokenizer = open_image_tokenizer(parts.image_tokenizer)
        tokenizer.save(building / "image_tokenizer")
        np.save(building / "clusters.npy", kmeans_labels(tokenizer.codebook.numpy(), num_clusters))
        for name in ("trunk", "sequential", "interpolation"):
            model = load_model(getattr(parts, name), dtype=dtype)
            models[name] = model.config
            shared = name != "trunk" and _same_trunk(getattr(parts, name), parts.trunk)
            save_model(building / name, model, trunk=building / "trunk" if shared else None)
        check_family(directory, text_tokenizer.vocabulary, tokenizer.num_tokens, models)
        hashes = {name: sha256_file(building / name) for name in HASHED_FILES}
        about = dataclasses.replace(config, prompt=_wording(parts) or config.prompt, sha256=hashes)
        write_json(building / "bundle.json", to_dict(about))
        if parts.sampling is not None:
            settings = load_config(SampleConfig, [parts.sampling])
            (building / "sampling.yaml").write_text(dump_yaml(settings), encoding="utf-8")


def _wording(parts: Parts) -> PromptFormat | None:
    """What the parts were trained to be told; None if none of them says. Raises: ValueError if they differ."""
    told: dict[PromptFormat, str] = {}
    for name in ("trunk", "sequential", "interpolation"):
        place = getattr(parts, name)
        wording = load_checkpoint(place, verify=False).extra.get("prompt")
        if wording is not None:
            told.setdefault(from_dict(PromptFormat, wording, origin=str(place)), name)
    if len(told) > 1:
        first, second, *_ = told.values()
        raise ValueError(f"{first} and {second} were trained with different wordings (data.prompt); use one family")
    return next(iter(told), None)


def _same_trunk(stage: Path, trunk: Path) -> bool:
    own, other = load_checkpoint(stage), load_checkpoint(trunk)
    return all(
        name in other.infos and torch.equal(own.tensor(name), other.tensor(name))
        for name in own.names
        if not is_temporal(name)
    )
