"""Opens a bundle of weights: one folder with everything that turns a caption into a video. `assemble.py` makes them.

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

from cogvideo.checkpoint.format import Checkpoint, load_checkpoint
from cogvideo.checkpoint.load import build_model
from cogvideo.config import from_dict, load_config, to_dict
from cogvideo.dtypes import ACTIVATION_DTYPES, WeightChoice, WeightName
from cogvideo.files import (
    BUNDLED_WEIGHTS,
    json_text,
    read_json,
    sha256_file,
)
from cogvideo.inference.backends import install_kernels
from cogvideo.inference.sampler import load_labels
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
)
from cogvideo.tokenizers.records import TokenizerRecords, describe_tokenizer
from cogvideo.tokenizers.text import TextTokenizer

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
        hint = "install the package again" if directory == BUNDLED_WEIGHTS else "give another folder"
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
    check_family(directory, text_tokenizer.vocabulary, len(image_tokenizer.codebook), configs)
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


def _open_image_tokenizer(directory: Path, folder: str) -> tuple[ImageTokenizer, np.ndarray | None]:
    tokenizer, labels = ImageTokenizer.load(directory / folder), directory / CLUSTERS[folder]
    return tokenizer, load_labels(labels, tokenizer.num_tokens) if labels.is_file() else None


def _share_trunk(stage: CogVideoTransformer, trunk: CogVideoTransformer) -> None:
    """Replace a stage's trunk modules with the trunk's own, which were frozen when the stage was trained."""
    for name, module in trunk.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if own and not any(map(is_temporal, own)):
            parent, _, last = name.rpartition(".")
            setattr(stage.get_submodule(parent), last, module)


def check_family(directory: Path, text: Vocabulary, num_codes: int, configs: dict[str, ModelConfig]) -> None:
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
