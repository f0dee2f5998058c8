"""Weights that visitors can choose from, each with its settings, adapters, super-resolution and examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cogvideo.demo.adapters import AdapterSwitch, short_name
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.hub import describe
from cogvideo.sampling.adapters import AdapterChoice
from cogvideo.sampling.bundle import fingerprint
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.jobs import check_one_family
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.superres import Upsampler

BUNDLED_NAME = "moving digits"


@dataclass
class ServedWeights:
    """A loaded bundle."""

    pipeline: Pipeline
    config: SampleConfig
    """Defaults for visitors' settings."""
    directory: Path = BUNDLED_WEIGHTS
    """What the pipeline was loaded from."""
    upsampler: Upsampler | None = None
    adapters: Mapping[str, AdapterChoice] = field(default_factory=dict)
    """Those that requests may choose from, by the name that visitors see."""
    examples: Sequence[str] = ()
    """Prompts to click on."""
    note: str = ""
    """What visitors should know about these weights, appended to `about`."""

    def __post_init__(self) -> None:
        """Raises: FileNotFoundError, ValueError for an adapter or super-resolution that does not fit."""
        if self.upsampler is not None:
            check_one_family(self.pipeline, self.upsampler)
        self.switch = AdapterSwitch(self.pipeline, dict(self.adapters))
        self.place, self.fingerprint = describe(self.directory), fingerprint(self.directory)

    @cached_property
    def about(self) -> str:
        """A line or two that describe the models."""
        pipeline = self.pipeline
        models = [model for model in (pipeline.trunk, pipeline.sequential, pipeline.interpolation) if model is not None]
        numbers = {id(parameter): parameter.numel() for model in models for parameter in model.parameters()}
        side = pipeline.sequential.config.frame_side * pipeline.image_tokenizer.compress_rate
        return (
            f"Text to video by an autoregressive transformer: {sum(numbers.values()) / 1e6:,.1f} million parameters, "
            f"frames of {side}x{side} pixels. {self.note}"
        )

    @property
    def about_large(self) -> str:
        """The frame size after super-resolution, in words; empty without it."""
        if self.upsampler is None:
            return ""
        side = self.upsampler.direct.config.high_res_side * self.upsampler.high_res_tokenizer.compress_rate
        return f"{side}x{side} pixels, by super-resolution afterwards"


def is_bundled(directory: Path) -> bool:
    return directory.resolve() == BUNDLED_WEIGHTS.resolve()


def name_weights(directories: Sequence[Path]) -> dict[str, Path]:
    """The directories by short names for visitors. Raises: ValueError for one that is given twice."""
    named: dict[str, Path] = {}
    for directory in directories:
        if directory.resolve() in [other.resolve() for other in named.values()]:
            raise ValueError(f"--model {directory} is given twice; leave one out")
        short = BUNDLED_NAME if is_bundled(directory) else short_name(directory)
        name, number = short, 2
        while name in named:
            name, number = f"{short}-{number}", number + 1
        named[name] = directory
    return named


def assign_adapters(
    adapters: Mapping[str, AdapterChoice], pipelines: Mapping[str, Pipeline]
) -> dict[str, dict[str, AdapterChoice]]:
    """All adapters that fit each of the weights, by name of the weights.

    Raises: FileNotFoundError, ValueError for an adapter that is damaged, or fits none of them.
    """
    assigned: dict[str, dict[str, AdapterChoice]] = {name: {} for name in pipelines}
    for adapter, choice in adapters.items():
        reasons = []
        for name, pipeline in pipelines.items():
            try:
                pipeline.add_adapter(adapter, choice.folder)
            except ValueError as error:
                reasons.append(error)
            else:
                assigned[name][adapter] = choice
        if len(reasons) == len(pipelines):
            raise reasons[0] if len(reasons) == 1 else ValueError(f"{choice} fits none of the weights: {reasons[0]}")
    return assigned
