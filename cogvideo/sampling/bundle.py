"""A bundle of weights: one folder with everything that turns a caption into a video. Opened and assembled here.

bundle.json        how captions are phrased for these weights (BundleConfig); optional
sampling.yaml      settings that suit them, applied over the published ones (SampleConfig; those of super-resolution in
                   the group `upsample`); optional
text.model         the text tokenizer
image_tokenizer/   the image tokenizer
clusters.npy       the cluster of each image code; optional
sequential/        stage 1
trunk/             draws the first frame; optional: by default stage 1's own trunk does
interpolation/     stage 2; optional: without it there is no interpolation
direct_superres/, iterative_superres/   super-resolution; optional
high_res_tokenizer/, high_res_clusters.npy   for its large frames; optional: by default they use the codes of small ones
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvideo.checkpoint.adapter import MAX_LOST, fingerprint_to_store, lost_share
from cogvideo.checkpoint.format import MANIFEST, Checkpoint, load_checkpoint
from cogvideo.checkpoint.load import build_model, build_superres, load_model, save_model
from cogvideo.config import dump_yaml, from_dict, load_config, to_dict
from cogvideo.dtypes import ACTIVATION_DTYPES, WeightChoice, WeightName, dtype_name
from cogvideo.files import (
    BUNDLED_WEIGHTS,
    atomic_directory,
    json_text,
    read_json,
    sha256_file,
    write_json,
    write_npy,
)
from cogvideo.inference.backends import install_kernels
from cogvideo.inference.sampler import kmeans_labels, load_labels
from cogvideo.logs import get_logger
from cogvideo.model.config import ModelConfig
from cogvideo.model.quantize import convert_weights, offload_layers
from cogvideo.model.transformer import CogVideoTransformer, is_temporal
from cogvideo.sampling.config import SampleAndUpsampleConfig, SampleConfig, UpsampleConfig
from cogvideo.sequence.layout import Vocabulary
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.tokenizers.image import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ImageTokenizer,
    check_same_codes,
    open_image_tokenizer,
)
from cogvideo.tokenizers.records import TokenizerRecords, describe_tokenizer
from cogvideo.tokenizers.text import TextTokenizer, open_text_tokenizer

log = get_logger(__name__)

SETTINGS_FILE, UPSAMPLE = "sampling.yaml", "upsample"
"""The file of a bundle's settings, and the group in it that holds those of super-resolution."""
IMAGE_TOKENIZER, HIGH_RES_TOKENIZER = "image_tokenizer", "high_res_tokenizer"
CLUSTERS = {IMAGE_TOKENIZER: "clusters.npy", HIGH_RES_TOKENIZER: "high_res_clusters.npy"}
HASHED_FILES = (
    "text.model",
    *CLUSTERS.values(),
    *(f"{folder}/{name}" for folder in CLUSTERS for name in (CONFIG_FILE, WEIGHTS_FILE)),
)
MODELS = ("trunk", "sequential", "interpolation")
SUPERRES = {"direct": "direct_superres", "iterative": "iterative_superres"}
MAX_UNUSED_EMBEDDINGS = 16
"""The published embedding table has a few more rows than the vocabulary has ids."""
CPU = torch.device("cpu")
Clusters = int | Path
"""How image codes are grouped: the number of clusters for k-means, or a .npy file with the cluster of each code."""


@dataclass(frozen=True)
class BundleConfig:
    """How the weights expect their input; sampling must phrase prompts as training did."""

    prompt: PromptFormat = field(default_factory=PromptFormat)
    sha256: dict[str, str] = field(default_factory=dict)
    """Hashes of the HASHED_FILES, which carry none of their own, by name; files not listed are not checked."""
    examples: list[str] = field(default_factory=list)
    """Prompts that show what the weights can do, for the web page. Not part of the fingerprint."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    config: BundleConfig
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    labels: np.ndarray | None
    """(num_codes,) cluster of each image code."""
    trunk: CogVideoTransformer
    sequential: CogVideoTransformer
    interpolation: CogVideoTransformer | None
    checkpoints: dict[str, Checkpoint]
    """What the models were loaded from, by their folder in the bundle."""


def load_sample_config(directory: Path, files: list[Path], overrides: list[str]) -> SampleConfig:
    """Merge settings: published defaults, then the bundle's, then the user's files, then `key=value` overrides.

    The files may also hold settings of super-resolution. Raises: as `load_config`; ValueError for overrides of these.
    """
    for word in overrides:
        if word.startswith(f"{UPSAMPLE}."):
            raise ValueError(f"{word} is a setting of super-resolution, used by `cogvideo sample --upsample` only")
    return load_config(SampleAndUpsampleConfig, files, overrides, stored=own_settings(directory)).split()[0]


def load_upsample_config(directory: Path | None, files: list[Path], overrides: list[str]) -> UpsampleConfig:
    """The same for settings of super-resolution alone; `directory` is None for models that are not a bundle's."""
    if directory is None:
        return load_config(UpsampleConfig, files, overrides)
    return load_config(UpsampleConfig, files, overrides, stored=own_settings(directory), stored_group=UPSAMPLE)


def settings_to_store(clips: SampleConfig, upsample: UpsampleConfig) -> dict[str, Any]:
    """The contents of a bundle's settings file.

    Of super-resolution, only what differs from the published settings is stored, so that the clips' seed, device and
    weights apply to it otherwise.
    """
    published = to_dict(UpsampleConfig())
    group = {name: value for name, value in to_dict(upsample).items() if value != published[name]}
    return to_dict(clips) | ({UPSAMPLE: group} if group else {})


def own_settings(directory: Path) -> Path | None:
    """The file of a bundle's own settings, if it has one."""
    file = directory / SETTINGS_FILE
    return file if file.is_file() else None


def open_bundle(
    directory: Path, weights: WeightChoice = "auto", device: torch.device = CPU, *, offload: bool = False
) -> Bundle:
    """Open a bundle with its models on `device` and their matrices stored as `weights`.

    `offload` leaves the layers' matrices in CPU memory. A trunk that models share is held in memory once.
    Raises: FileNotFoundError if a part is missing; ValueError, in one line, for damaged or mismatched parts.
    """
    if not (directory / "sequential").is_dir():
        hint = "run `make pretrained` to train them" if directory == BUNDLED_WEIGHTS else "give another folder"
        raise FileNotFoundError(f"no bundle of weights at {directory}: it has no sequential/; {hint}")
    config = read_config(directory)
    checkpoints = {name: load_checkpoint(directory / name) for name in MODELS if (directory / name).is_dir()}
    # memory-mapped: tensors are read from disk when they are first used
    models = {name: build_model(checkpoint) for name, checkpoint in checkpoints.items()}
    for name, checkpoint in checkpoints.items():
        for other in checkpoints:
            if checkpoint.trunk and checkpoint.trunk.directory.resolve() == (directory / other).resolve():
                _share_trunk(models[name], models[other])
    text_tokenizer, image_tokenizer, labels = open_tokenizers(directory)
    configs = {name: model.config for name, model in models.items()}
    _check_family(directory, text_tokenizer.vocabulary, len(image_tokenizer.codebook), configs)
    own = own_tokenizers(directory, text_tokenizer, image_tokenizer)
    for name, checkpoint in checkpoints.items():
        check_tokenizers(checkpoint, own, str(directory / name), str(directory))
    for model in models.values():
        place_model(model, weights, device, offload=offload)
    image_tokenizer.model.to(device)
    return Bundle(
        config,
        text_tokenizer,
        image_tokenizer,
        labels,
        trunk=models.get("trunk", models["sequential"]),
        sequential=models["sequential"],
        interpolation=models.get("interpolation"),
        checkpoints=checkpoints,
    )


def read_config(directory: Path) -> BundleConfig:
    """Read a bundle's bundle.json and check the files against the hashes in it.

    Raises: FileNotFoundError, ValueError.
    """
    file = directory / "bundle.json"
    if not file.is_file():
        return BundleConfig()
    config = from_dict(BundleConfig, read_json(file, dict[str, Any]), str(file))
    for name in HASHED_FILES:
        if name in config.sha256 and sha256_file(directory / name) != config.sha256[name]:
            raise ValueError(
                f"{directory / name} is damaged: its sha256 differs from the one in {file.name}; fetch it again"
            )
    return config


def open_tokenizers(directory: Path) -> tuple[TextTokenizer, ImageTokenizer, np.ndarray | None]:
    """Open a bundle's text and image tokenizers, and the cluster of each image code if the bundle has them.

    Raises: FileNotFoundError, ValueError.
    """
    return TextTokenizer.load(directory / "text.model"), *_open_image_tokenizer(directory, IMAGE_TOKENIZER)


def open_high_res_tokenizer(
    directory: Path, image_tokenizer: ImageTokenizer
) -> tuple[ImageTokenizer, np.ndarray | None] | None:
    """The image tokenizer of super-resolution's large frames and its clusters, if the bundle has a separate one.

    Raises: FileNotFoundError, ValueError.
    """
    if not (directory / HIGH_RES_TOKENIZER).is_dir():
        return None
    high_res_tokenizer, labels = _open_image_tokenizer(directory, HIGH_RES_TOKENIZER)
    check_same_codes(image_tokenizer, high_res_tokenizer)
    return high_res_tokenizer, labels


def own_tokenizers(
    directory: Path, text: TextTokenizer, image: ImageTokenizer, high_res: ImageTokenizer | None = None
) -> TokenizerRecords:
    """The records of a bundle's tokenizers; `high_res`: that of large frames, if it is a separate one."""
    return TokenizerRecords(
        describe_tokenizer(directory / IMAGE_TOKENIZER, image),
        text.sha256,
        None if high_res is None else describe_tokenizer(directory / HIGH_RES_TOKENIZER, high_res),
    )


def check_tokenizers(checkpoint: Checkpoint, given: TokenizerRecords, name: str, where: str) -> None:
    """Check that a model was trained with the tokenizers `given`.

    Raises: ValueError, which calls the model `name` and the source of the tokenizers `where`.
    """
    trained = TokenizerRecords.of_export(checkpoint.extra)
    kind = trained.differing(given, both_sizes="superres" in checkpoint.config)
    if kind is not None:
        raise ValueError(
            f"{name} was trained with another {kind} than that of {where}; use the one it was trained with"
        )


def place_model(
    model: CogVideoTransformer | SuperresTransformer, choice: WeightChoice, device: torch.device, *, offload: bool
) -> None:
    """Convert a model's matrices to the chosen type, move it to `device`, and install the fastest kernels for it.

    `offload` keeps the layers' matrices where they are.
    """
    weights = weights_for(device, choice)
    convert_weights(model, weights, ACTIVATION_DTYPES[weights] if device.type != "cpu" else torch.float32)
    if offload:
        offload_layers(model)
    model.to(device)
    install_kernels(model, device)


def weights_for(device: torch.device, choice: WeightChoice) -> WeightName:
    """The number type that models are sampled with: for `auto` bfloat16 on an accelerator, float32 on a CPU.

    Raises: ValueError for float8 on a CPU.
    """
    if choice == "float8" and device.type == "cpu":
        raise ValueError("weights=float8 is for GPUs; on a CPU choose weights=int8, which takes the same memory")
    if choice != "auto":
        return choice
    return "fp32" if device.type == "cpu" else "bf16"


def fingerprint(directory: Path) -> str:
    """The hex SHA-256 of everything in a bundle that determines its clips, except its settings."""
    # a checkpoint's manifest holds the hashes of its files
    manifests = [f"{model}/manifest.json" for model in MODELS]
    hashes = []
    for name in (*HASHED_FILES, "bundle.json", *manifests):
        file = directory / name
        if not file.is_file():
            continue
        if name != "bundle.json":
            hashes.append(f"{name} {sha256_file(file)}\n")
        # example prompts do not affect the output
        elif phrasing := {key: value for key, value in read_json(file, dict[str, Any]).items() if key != "examples"}:
            hashes.append(f"{name} {hashlib.sha256(json_text(phrasing).encode()).hexdigest()}\n")
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


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
        _check_family(directory, text_tokenizer.vocabulary, image_tokenizer.num_tokens, configs)
        hashes = {name: sha256_file(building / name) for name in HASHED_FILES if (building / name).is_file()}
        config = replace(config, prompt=prompt, sha256=hashes)
        write_json(building / "bundle.json", to_dict(config))
        if settings is not None:
            (building / SETTINGS_FILE).write_text(dump_yaml(settings), encoding="utf-8")


def _open_image_tokenizer(directory: Path, folder: str) -> tuple[ImageTokenizer, np.ndarray | None]:
    tokenizer, labels = ImageTokenizer.load(directory / folder), directory / CLUSTERS[folder]
    return tokenizer, load_labels(labels, tokenizer.num_tokens) if labels.is_file() else None


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


def _share_trunk(stage: CogVideoTransformer, trunk: CogVideoTransformer) -> None:
    """Replace a stage's trunk modules with the trunk's own, which were frozen when the stage was trained."""
    for name, module in trunk.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if own and not any(map(is_temporal, own)):
            parent, _, last = name.rpartition(".")
            setattr(stage.get_submodule(parent), last, module)


def _check_family(directory: Path, text: Vocabulary, num_codes: int, configs: dict[str, ModelConfig]) -> None:
    """Check that the models and the tokenizers agree. Raises: ValueError."""
    sequential = configs["sequential"]
    for name, other in configs.items():
        if (other.vocabulary, other.frame_side) != (sequential.vocabulary, sequential.frame_side):
            raise ValueError(f"{directory}: {name}/ and sequential/ differ in vocabulary or frame side; use one family")
        if name != "trunk" and other.task != name:
            raise ValueError(f"{directory}: {name}/ holds a model with task={other.task}; put the right one there")
    known = sequential.vocabulary
    if replace(text, size=known.size) != known or not 0 <= known.size - text.size <= MAX_UNUSED_EMBEDDINGS:
        raise ValueError(
            f"{directory}: text.model has {text.size - text.num_image_tokens} pieces after {text.num_image_tokens} "
            f"image tokens, the models {known.size - known.num_image_tokens} after {known.num_image_tokens}; "
            "use the one they were trained with"
        )
    if num_codes != known.num_image_tokens:
        raise ValueError(
            f"{directory}: the image tokenizer has {num_codes} codes, the models expect {known.num_image_tokens}; "
            "use the one they were trained with"
        )


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
