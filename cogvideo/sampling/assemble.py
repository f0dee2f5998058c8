"""Put trained parts together into one bundle folder, storing a trunk that several of them share only once."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import build_superres, load_model, save_model
from cogvideo.config import dump_yaml, from_dict, load_config, to_dict
from cogvideo.files import atomic_directory, sha256_file, write_json
from cogvideo.inference.clusters import kmeans_labels
from cogvideo.model.config import ModelConfig
from cogvideo.sampling.bundle import HASHED_FILES, SUPERRES, BundleConfig, check_family
from cogvideo.sampling.config import SampleConfig
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.tokenizers.image import open_image_tokenizer
from cogvideo.tokenizers.text import open_text_tokenizer


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
    direct: Path | None = None
    """The direct super-resolution model."""
    iterative: Path | None = None
    """The iterative one."""


def assemble_bundle(
    directory: Path, parts: Parts, *, config: BundleConfig, num_clusters: int, dtype: torch.dtype, replace: bool = False
) -> None:
    """Write a bundle that `open_bundle` reads. The folder appears whole or not at all.

    A model whose trunk equals `parts.trunk` (it was trained frozen) is stored without it.
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
        for method, folder in SUPERRES.items():
            place: Path | None = getattr(parts, method)
            if place is not None:
                fine = build_superres(load_checkpoint(place), dtype=dtype)
                if (fine.config.method, fine.config.vocabulary) != (method, models["sequential"].vocabulary):
                    raise ValueError(f"{place} is not the {method} model of this family; give another --{method}")
                shared = _same_trunk(place, parts.trunk)
                save_model(building / folder, fine, trunk=building / "trunk" if shared else None)
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


def _same_trunk(model: Path, trunk: Path) -> bool:
    own, other = load_checkpoint(model), load_checkpoint(trunk)
    return all(name in own.infos and torch.equal(own.tensor(name), other.tensor(name)) for name in other.names)
