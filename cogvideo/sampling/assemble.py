"""Assembles a bundle of weights (see `bundle.py`) from its parts: tokenizers, transformers, settings and examples."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cogvideo.checkpoint.adapter import MAX_LOST, fingerprint_to_store, lost_share
from cogvideo.checkpoint.format import MANIFEST, load_checkpoint
from cogvideo.checkpoint.load import build_superres, load_model, save_model
from cogvideo.config import dump_yaml, from_dict, load_config, to_dict
from cogvideo.dtypes import dtype_name
from cogvideo.files import (
    atomic_directory,
    sha256_file,
    write_json,
    write_npy,
)
from cogvideo.inference.sampler import kmeans_labels, load_labels
from cogvideo.logs import get_logger
from cogvideo.model.config import ModelConfig
from cogvideo.sampling.bundle import (
    CLUSTERS,
    HASHED_FILES,
    HIGH_RES_TOKENIZER,
    IMAGE_TOKENIZER,
    MODELS,
    SETTINGS_FILE,
    SUPERRES,
    BundleConfig,
    check_family,
    check_tokenizers,
    own_tokenizers,
    settings_to_store,
)
from cogvideo.sampling.config import SampleAndUpsampleConfig, SampleConfig
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.tokenizers.image import (
    ImageTokenizer,
    check_same_codes,
    open_image_tokenizer,
)
from cogvideo.tokenizers.records import TokenizerRecords, describe_tokenizer
from cogvideo.tokenizers.text import open_text_tokenizer

log = get_logger(__name__)

Clusters = int | Path
"""How image codes are grouped: the number of clusters for k-means, or a .npy file with the cluster of each code."""


@dataclass(frozen=True)
class Parts:
    """Where to find the parts of a bundle to be assembled."""

    text_tokenizer: Path
    image_tokenizer: Path
    trunk: Path
    sequential: Path
    interpolation: Path | None = None
    sampling: Path | None = None
    """A YAML file of settings that suit these weights."""
    direct: Path | None = None
    """The direct super-resolution model."""
    iterative: Path | None = None
    """The iterative super-resolution model."""
    high_res_tokenizer: Path | None = None
    """The image tokenizer of super-resolution's large frames; None: `image_tokenizer`."""

    @property
    def models(self) -> dict[str, Path]:
        """The given trunk and stages, by their folder in a bundle; the trunk is first."""
        found: dict[str, Path | None] = {name: getattr(self, name) for name in MODELS}
        return {name: path for name, path in found.items() if path is not None}

    def settings(self) -> dict[str, Any] | None:
        """The settings to store; None: the published ones apply. Raises: ValueError if they need a stage 2, OSError."""
        if self.sampling is None:
            return None if self.interpolation is not None else to_dict(SampleConfig(rounds=0))
        settings, upsample = load_config(SampleAndUpsampleConfig, [self.sampling]).split()
        if settings.rounds and self.interpolation is None:
            raise ValueError(
                f"--sampling {self.sampling} has rounds={settings.rounds} of interpolation, which need stage 2; give "
                "--interpolation, or set rounds: 0"
            )
        return settings_to_store(settings, upsample)


def check_replaceable(directory: Path) -> None:
    """Raises: FileExistsError if `directory` is neither a bundle nor an empty folder: replacing it would lose files."""
    is_bundle = (directory / "text.model").is_file() and (directory / "sequential" / MANIFEST).is_file()
    if directory.exists() and not is_bundle and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not a bundle; choose another folder, since this one would be deleted")


def assemble_bundle(
    directory: Path,
    parts: Parts,
    *,
    config: BundleConfig,
    clusters: Clusters,
    high_res_clusters: Clusters | None = None,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> None:
    """Write a bundle that `open_bundle` reads. The folder appears complete or not at all.

    A model whose trunk equals `parts.trunk` (it was trained with the trunk frozen) is stored without it.
    `high_res_clusters` group the codes of `parts.high_res_tokenizer`; None: into as many clusters as `clusters`.
    Raises: FileExistsError if `directory` exists and `overwrite` is not set, or is not a bundle; ValueError for parts
    that are damaged or do not belong together.
    """
    for option, given_clusters in (("--clusters", clusters), ("--high-res-clusters", high_res_clusters)):
        if isinstance(given_clusters, int) and given_clusters < 1:
            raise ValueError(f"{option} {given_clusters}; expected at least 1, or a .npy file")
    if high_res_clusters is not None and parts.high_res_tokenizer is None:
        raise ValueError("--high-res-clusters groups the codes of --high-res-tokenizer; give it too, or leave this out")
    if parts.high_res_tokenizer is not None and parts.direct is None:
        raise ValueError("--high-res-tokenizer is for super-resolution; give --direct too, or leave it out")
    if overwrite:
        check_replaceable(directory)
    text_tokenizer = open_text_tokenizer(parts.text_tokenizer)
    settings = parts.settings()
    configs: dict[str, ModelConfig] = {}
    with atomic_directory(directory, replace=overwrite) as building:
        text_tokenizer.save(building / "text.model")
        image_tokenizer, num_clusters = _add_image_tokenizer(building, IMAGE_TOKENIZER, parts.image_tokenizer, clusters)
        given = TokenizerRecords(describe_tokenizer(parts.image_tokenizer, image_tokenizer), text_tokenizer.sha256)
        high_res = None
        if parts.high_res_tokenizer is not None:
            if high_res_clusters is None:
                high_res_clusters = clusters if isinstance(clusters, int) else num_clusters
            high_res, _ = _add_image_tokenizer(
                building, HIGH_RES_TOKENIZER, parts.high_res_tokenizer, high_res_clusters
            )
            check_same_codes(image_tokenizer, high_res)
            given = replace(given, high_res=describe_tokenizer(parts.high_res_tokenizer, high_res))
        _check_trained_with(parts, given)
        _warn_of_lost_updates(parts, dtype)
        trained_prompt = _trained_prompt_format(parts)
        prompt = trained_prompt or config.prompt
        # a default that no checkpoint records is not stored: other parts may have been trained with another format
        format = {} if trained_prompt is None and prompt == PromptFormat() else {"prompt": to_dict(prompt)}
        stored = own_tokenizers(building, text_tokenizer, image_tokenizer).to_extra() | format
        both_sizes = own_tokenizers(building, text_tokenizer, image_tokenizer, high_res).to_extra()
        for name, source in parts.models.items():
            model = load_model(source, dtype=dtype)
            configs[name] = model.config
            shared = name != "trunk" and _has_same_trunk(source, parts.trunk)
            extra = stored | fingerprint_to_store(load_checkpoint(source, verify=False))
            save_model(building / name, model, extra=extra, trunk=building / "trunk" if shared else None)
        for method, folder in SUPERRES.items():
            source = getattr(parts, method)
            if source is not None:
                checkpoint = load_checkpoint(source)
                superres = build_superres(checkpoint, dtype=dtype)
                if (superres.config.method, superres.config.vocabulary) != (method, configs["sequential"].vocabulary):
                    raise ValueError(f"{source} is not the {method} model of this family; give another --{method}")
                shared = _has_same_trunk(source, parts.trunk)
                extra = both_sizes | fingerprint_to_store(checkpoint)
                save_model(building / folder, superres, extra=extra, trunk=building / "trunk" if shared else None)
        check_family(directory, text_tokenizer.vocabulary, image_tokenizer.num_tokens, configs)
        hashes = {name: sha256_file(building / name) for name in HASHED_FILES if (building / name).is_file()}
        config = replace(config, prompt=prompt, sha256=hashes)
        write_json(building / "bundle.json", to_dict(config))
        if settings is not None:
            (building / SETTINGS_FILE).write_text(dump_yaml(settings), encoding="utf-8")


def _add_image_tokenizer(directory: Path, folder: str, source: Path, clusters: Clusters) -> tuple[ImageTokenizer, int]:
    """Copy a tokenizer and the clusters of its codes into a bundle; returns the tokenizer and their number."""
    tokenizer = open_image_tokenizer(source)
    tokenizer.save(directory / folder)
    if isinstance(clusters, Path):
        labels = load_labels(clusters, tokenizer.num_tokens)
    else:
        labels = kmeans_labels(tokenizer.codebook.numpy(), clusters)
    write_npy(directory / CLUSTERS[folder], labels)
    return tokenizer, int(labels.max()) + 1


def _check_trained_with(parts: Parts, given: TokenizerRecords) -> None:
    """Check that the models were trained with the tokenizers that are given; warn about those that do not record it.

    Raises: ValueError.
    """
    sources = {name: getattr(parts, name) for name in (*MODELS, *SUPERRES) if getattr(parts, name) is not None}
    unknown = []
    for name, source in sources.items():
        checkpoint = load_checkpoint(source, verify=False)
        where = f"--tokenizer {parts.image_tokenizer} and --text {parts.text_tokenizer}"
        if name in SUPERRES:
            where = f"--high-res-tokenizer {parts.high_res_tokenizer or parts.image_tokenizer}, {where}"
        check_tokenizers(checkpoint, given, f"--{name} {source}", where)
        if TokenizerRecords.of_export(checkpoint.extra).image is None:
            unknown.append(f"--{name}")
    if unknown:
        log.warning(
            "%s: exported by an older version or converted, without a record of the tokenizers; make sure that "
            "--tokenizer and --text are those that the models were trained with",
            ", ".join(unknown),
        )


def _warn_of_lost_updates(parts: Parts, dtype: torch.dtype) -> None:
    """Warn about models for which storing as `dtype` rounds away much of what merged adapters added."""
    for name in (*MODELS, *SUPERRES):
        source = getattr(parts, name)
        lost = 0.0 if source is None else lost_share(load_checkpoint(source, verify=False).extra, dtype)
        if lost > MAX_LOST:
            log.warning(
                "--%s %s: storing as %s rounds away %.0f %% of what adapters added; use --dtype fp32 to keep it",
                *(name, source, dtype_name(dtype), 100 * lost),
            )


def _trained_prompt_format(parts: Parts) -> PromptFormat | None:
    """The prompt format that the parts were trained with; None if no checkpoint records it.

    Raises: ValueError if they differ.
    """
    formats: dict[PromptFormat, str] = {}
    for name, source in parts.models.items():
        recorded = load_checkpoint(source, verify=False).extra.get("prompt")
        if recorded is not None:
            formats.setdefault(from_dict(PromptFormat, recorded, origin=str(source)), name)
    if len(formats) > 1:
        first, second, *_ = formats.values()
        raise ValueError(
            f"{first} and {second} were trained with different prompt formats (data.prompt); use one family"
        )
    return next(iter(formats), None)


def _has_same_trunk(model: Path, trunk: Path) -> bool:
    own, other = load_checkpoint(model), load_checkpoint(trunk)
    return all(name in own.infos and torch.equal(own.tensor(name), other.tensor(name)) for name in other.names)
