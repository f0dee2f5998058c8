"""A bundle of weights on disk: all that turns a caption into a video, in one folder.

bundle.json        how captions are worded for these weights (BundleConfig); may be absent
sampling.yaml      settings that suit them, over the published ones (SampleConfig); may be absent
text.model         the text tokenizer
image_tokenizer/   the image tokenizer
clusters.npy       clusters of its codes; may be absent
sequential/        stage 1
trunk/             makes the first frame; may be absent: stage 1's own trunk does
interpolation/     stage 2; may be absent: then there is no interpolation
direct_superres/, iterative_superres/   for `cogvideo upsample`, which alone opens them; may be absent
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import build_model
from cogvideo.config import from_dict, load_config
from cogvideo.files import BUNDLED_WEIGHTS, read_json, sha256_file
from cogvideo.inference.clusters import load_labels
from cogvideo.model.config import ModelConfig
from cogvideo.model.quantize import convert_weights, stream_layers
from cogvideo.model.transformer import CogVideoTransformer, is_temporal
from cogvideo.sampling.config import SampleConfig, Weights
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.sequence.vocabulary import Vocabulary
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.tokenizers.text import TextTokenizer

HASHED_FILES = ("text.model", "clusters.npy", "image_tokenizer/config.json", "image_tokenizer/model.safetensors")
MODELS = ("trunk", "sequential", "interpolation")
SUPERRES = {"direct": "direct_superres", "iterative": "iterative_superres"}
UNUSED_ROWS = 16  # the published embedding table has a few rows more than there are ids
ACTIVATIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}
"""What an accelerator computes in, by `weights`; a CPU computes in float32."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class BundleConfig:
    """What the weights were trained to read; sampling must say it the same way."""

    prompt: PromptFormat = field(default_factory=PromptFormat)
    sha256: dict[str, str] = field(default_factory=dict)
    """Of files that carry no hash of their own (HASHED_FILES), by name; what is not listed is not checked."""


@dataclass(frozen=True)
class Bundle:
    """An opened folder."""

    config: BundleConfig
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    labels: np.ndarray | None
    """(num_codes,) cluster of each image code."""
    trunk: CogVideoTransformer
    sequential: CogVideoTransformer
    interpolation: CogVideoTransformer | None


def sampling_defaults(directory: Path) -> list[Path]:
    """The bundle's own settings file, if it has one, to be merged before the user's."""
    path = directory / "sampling.yaml"
    return [path] if path.is_file() else []


def bundle_sample_config(directory: Path, files: list[Path], overrides: list[str]) -> SampleConfig:
    """Published defaults, then the bundle's, then the user's files and words."""
    return load_config(SampleConfig, [*sampling_defaults(directory), *files], overrides)


def open_bundle(
    directory: Path, weights: Weights = "fp32", device: torch.device = _CPU, *, streamed: bool = False
) -> Bundle:
    """A folder's models on `device`, with their matrices held as `weights` says; `streamed`: those of layers stay.

    Raises: FileNotFoundError if a part is missing; ValueError, in one line, for damaged parts or unfit ones.
    """
    if not (directory / "sequential").is_dir():
        hint = "run `make pretrained` to train them" if directory == BUNDLED_WEIGHTS else "give another folder"
        raise FileNotFoundError(f"no bundle of weights at {directory}: it has no sequential/; {hint}")
    about = directory / "bundle.json"
    config = from_dict(BundleConfig, read_json(about), str(about)) if about.is_file() else BundleConfig()
    for name in HASHED_FILES:
        if name in config.sha256 and sha256_file(directory / name) != config.sha256[name]:
            raise ValueError(
                f"{directory / name} is damaged: its sha256 is not the one in {about.name}; fetch it again"
            )

    found = {name: load_checkpoint(directory / name) for name in MODELS if (directory / name).is_dir()}
    models = {name: build_model(checkpoint) for name, checkpoint in found.items()}  # as stored: mapped, not read yet
    for name, checkpoint in found.items():
        for other in found:
            if checkpoint.trunk and checkpoint.trunk.directory.resolve() == (directory / other).resolve():
                _share_trunk(models[name], models[other])
    sequential, interpolation = models["sequential"], models.get("interpolation")
    trunk = models.get("trunk", sequential)
    text_tokenizer, image_tokenizer, labels = open_tokenizers(directory)
    configs = {name: model.config for name, model in models.items()}
    check_family(directory, text_tokenizer.vocabulary, len(image_tokenizer.codebook), configs)
    for model in models.values():
        convert_weights(model, weights, ACTIVATIONS[weights] if device.type != "cpu" else torch.float32)
        if streamed:
            stream_layers(model)
        model.to(device)
    image_tokenizer.model.to(device)
    return Bundle(config, text_tokenizer, image_tokenizer, labels, trunk, sequential, interpolation)


def open_tokenizers(directory: Path) -> tuple[TextTokenizer, ImageTokenizer, np.ndarray | None]:
    """A bundle's text tokenizer, its image tokenizer, and the cluster of each code, if it says so.

    Raises: FileNotFoundError, ValueError.
    """
    text_tokenizer = TextTokenizer.load(directory / "text.model")
    image_tokenizer = ImageTokenizer.load(directory / "image_tokenizer")
    labels_file = directory / "clusters.npy"
    labels = load_labels(labels_file, len(image_tokenizer.codebook)) if labels_file.is_file() else None
    return text_tokenizer, image_tokenizer, labels


def fingerprint(directory: Path) -> str:
    """The hex SHA-256 of all that decides what a bundle makes, but for its settings."""
    # a checkpoint's manifest holds the hashes of its files
    manifests = [f"{model}/manifest.json" for model in MODELS]
    names = [*HASHED_FILES, "bundle.json", *manifests]
    hashes = [f"{name} {sha256_file(directory / name)}\n" for name in names if (directory / name).is_file()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _share_trunk(stage: CogVideoTransformer, trunk: CogVideoTransformer) -> None:
    """Put the trunk's own modules into a stage that was trained with them frozen: one trunk in memory."""
    for name, module in trunk.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if own and not any(map(is_temporal, own)):
            parent, _, last = name.rpartition(".")
            setattr(stage.get_submodule(parent), last, module)


def check_family(directory: Path, text: Vocabulary, codes: int, models: dict[str, ModelConfig]) -> None:
    """All models must read the same texts and speak of the same pictures. Raises: ValueError."""
    first = models["sequential"]
    for name, other in models.items():
        if (other.vocabulary, other.frame_side) != (first.vocabulary, first.frame_side):
            raise ValueError(f"{directory}: {name}/ and sequential/ differ in vocabulary or frame side; use one family")
        if name != "trunk" and other.task != name:
            raise ValueError(f"{directory}: {name}/ holds a model of the task {other.task}; put the right one there")
    known = first.vocabulary
    if replace(text, size=known.size) != known or not 0 <= known.size - text.size <= UNUSED_ROWS:
        raise ValueError(
            f"{directory}: text.model has {text.size - text.num_image_tokens} pieces behind {text.num_image_tokens} "
            f"image tokens, the models {known.size - known.num_image_tokens} behind {known.num_image_tokens}; "
            "use the one they were trained with"
        )
    if codes != known.num_image_tokens:
        raise ValueError(
            f"{directory}: the image tokenizer has {codes} codes, the models expect {known.num_image_tokens}"
        )
