"""Finetuning a bundle on captioned videos: what the weights fix, what can change, and the steps.

The tokenizers, the frame size and the maximum prompt length stay, except that text pieces are added if captions need
them. All weights are trained if they fit the device by the planner's estimate, otherwise adapters (LoRA).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import stored_config
from cogvideo.config import from_dict, to_dict
from cogvideo.data.captions import CaptionsFile
from cogvideo.data.shards import read_manifest
from cogvideo.data.statistics import MAX_CAPTIONS, CaptionLengths, spread
from cogvideo.files import read_json
from cogvideo.hub import describe
from cogvideo.inference.sampler import PUBLISHED_CLUSTERS
from cogvideo.model.config import ModelConfig
from cogvideo.planning.budgets import training_budget
from cogvideo.planning.machines import Machine
from cogvideo.recipes.common import VALIDATION, batch_size, bundle_step, holds_out, samples_step, training_settings
from cogvideo.recipes.folder import RecipeFolder
from cogvideo.recipes.steps import Step
from cogvideo.recipes.survey import Survey
from cogvideo.sampling.bundle import (
    CLUSTERS,
    HIGH_RES_TOKENIZER,
    IMAGE_TOKENIZER,
    SUPERRES,
    BundleConfig,
    load_sample_config,
    load_upsample_config,
    open_tokenizers,
    settings_to_store,
)
from cogvideo.sampling.config import SampleConfig, UpsampleConfig
from cogvideo.sampling.prompts import model_clip_seconds
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.tokenizers.text import TextTokenizer
from cogvideo.training.config import TrainConfig
from cogvideo.training.resources import NothingFits, planned_settings, resolve_auto

Mode = Literal["all", "lora"]
SHARES = {"trunk": 0.2, "sequential": 0.45, "interpolation": 0.35}
"""Share of the time that each training run gets."""
STEPS = {"trunk": 500, "sequential": 500, "interpolation": 500}
BATCHES = {"trunk": 16, "sequential": 8, "interpolation": 8}
LEARNING_RATES: Mapping[Mode, float] = {"all": 1e-4, "lora": 1e-3}
STAGES = ("sequential", "interpolation")
"""What a bundle must have to be finetuned; a trunk may be missing."""
CLIPS = {"clips": "data", "clips_between": "data_between"}
"""Folders of clips, and their configs. The second is for stage 2 if it has another number of frames per clip."""
UPSCALING = {**SUPERRES, "high-res-tokenizer": HIGH_RES_TOKENIZER}
"""A bundle's folders for super-resolution, which is not finetuned, keyed by option of `cogvideo bundle`."""
FROM_DATA = ("frame_side", "num_frames", "num_positions")
"""Sizes of a model that `cogvideo train` takes from its data."""
RANK = 16
MAX_NEW_PIECES = 512
TITLES = {
    "trunk": "The text-to-image trunk, which draws first frames.",
    "sequential": "Stage 1: five frames one after the other.",
    "interpolation": "Stage 2: two frames between three given ones.",
}


@dataclass(frozen=True)
class Base:
    """The bundle to start from."""

    path: Path
    config: BundleConfig
    text: TextTokenizer
    image: ImageTokenizer
    models: dict[str, ModelConfig]
    """trunk (if the bundle has one), sequential, interpolation."""
    sampling: SampleConfig
    upsampling: UpsampleConfig

    @classmethod
    def open(cls, path: Path) -> "Base":
        """Read what the steps depend on. Raises: FileNotFoundError, ValueError for an incomplete bundle."""
        for name in STAGES:
            if not (path / name).is_dir():
                raise FileNotFoundError(
                    f"{describe(path)} is not a complete bundle of weights: {name}/ is missing; give another one"
                )
        text, image, _ = open_tokenizers(path)
        models = {}
        for name in STEPS:
            if not (path / name).is_dir():
                continue
            stored = stored_config(load_checkpoint(path / name, verify=False))
            if not isinstance(stored, ModelConfig):
                raise ValueError(f"{describe(path / name)} holds a super-resolution model; give a complete bundle")
            models[name] = stored
        config = BundleConfig()
        if (path / "bundle.json").is_file():
            config = from_dict(BundleConfig, read_json(path / "bundle.json", dict[str, Any]), str(path / "bundle.json"))
        settings = load_sample_config(path, [], []), load_upsample_config(path, [], [])
        return cls(path, config, text, image, models, *settings)

    @property
    def pixels(self) -> int:
        return self.models["sequential"].frame_side * self.image.compress_rate

    @property
    def has_one_clip_size(self) -> bool:
        """Whether both stages have clips with the same number of frames."""
        return self.models["sequential"].num_frames == self.models["interpolation"].num_frames

    def clip_seconds(self, survey: Survey) -> tuple[float, ...]:
        """The length that stage 1 is sampled at, and its halves, one per round of interpolation; longest first.

        Lengths that do not fit the videos are left out. Raises: ValueError if none fits.
        """
        return self._lengths(survey, self.sampling.seconds, self.sampling.rounds + 1, "sequential")

    def between_seconds(self, survey: Survey) -> tuple[float, ...]:
        """The lengths of stage 2's clips, one per round of interpolation. Otherwise as `clip_seconds`."""
        layout, key_frames = self.models["interpolation"].layout, self.models["sequential"].num_frames
        longest = model_clip_seconds(layout, key_frames, self.sampling.seconds)
        return self._lengths(survey, longest, max(1, self.sampling.rounds), "interpolation")

    def _lengths(self, survey: Survey, longest: float, count: int, name: str) -> tuple[float, ...]:
        learned = tuple(longest / 2**k for k in range(count))
        lengths = tuple(length for length in learned if survey.fits(length, self.models[name].num_frames))
        if not lengths:
            names = ", ".join(f"{length:g}" for length in learned)
            raise ValueError(f"the bundle draws clips of {names} s, and the videos are shorter; give longer ones")
        return lengths

    def describe_fixed(self) -> str:
        """What cannot change, in a sentence."""
        sequential = self.models["sequential"]
        return (
            f"fixed by {describe(self.path)}: frames of {self.pixels}x{self.pixels} pixels ({sequential.frame_side}x"
            f"{sequential.frame_side} tokens), {sequential.num_frames} frames per clip, prompts of at most "
            f"{sequential.text_len} text tokens, both tokenizers"
        )


@dataclass(frozen=True)
class CaptionNeeds:
    """What the captions require of the text tokenizer."""

    new_pieces: int
    num_cut: int
    """Captions that are longer than the model reads, even with the new pieces."""
    count: int

    @classmethod
    def of(cls, base: Base, captions: CaptionsFile) -> "CaptionNeeds":
        texts = [caption.text for caption in captions.select(spread(len(captions), MAX_CAPTIONS))]
        extended = base.text.extended(texts, MAX_NEW_PIECES)
        lengths = CaptionLengths.of_clips(texts, extended)
        new = extended.vocabulary.size - base.text.vocabulary.size
        return cls(new, lengths.num_above(base.models["sequential"].text_len), len(texts))

    def __str__(self) -> str:
        pieces = f"{self.new_pieces or 'no'} new text piece{'' if self.new_pieces == 1 else 's'}"
        cut = f"; {self.num_cut:,} of {self.count:,} captions are too long and will be cut" if self.num_cut else ""
        return f"{pieces}{cut}"


@dataclass(frozen=True)
class FinetuneRecipe:
    """The steps for a bundle, videos and a machine; all paths are in `folder`."""

    folder: RecipeFolder
    base: Base
    captions: CaptionsFile
    captions_words: tuple[str, ...]
    survey: Survey
    new_pieces: int
    mode: Mode
    bf16: bool = False
    num_gpus: int = 0
    minutes: float | None = None

    @property
    def start(self) -> Path:
        """The bundle that training starts from: a copy with the new pieces if there are any, else the base itself."""
        return self.folder / "base" if self.new_pieces else self.base.path

    def steps(self) -> list[Step]:
        out, start = self.folder, self.start
        tokenizer, text = start / "image_tokenizer", start / "text.model"
        text_len = str(self.base.models["sequential"].text_len)
        held_out: tuple[str, ...] = ("--validation", str(VALIDATION)) if holds_out(self.survey) else ()

        steps = []
        words: list[str | Path]
        if self.new_pieces:
            words = ["vocabulary", *self.captions_words, "--extend", self.base.path]
            steps.append(out.step("base", [*words, "--pieces", str(MAX_NEW_PIECES), "--out", start, "--overwrite"]))
        for clips, data in CLIPS.items():
            if clips == "clips" or not self.base.has_one_clip_size:
                words = ["prepare", *self.captions_words, *held_out, "--tokenizer", tokenizer, "--text-tokenizer", text]
                words += ["--text-len", text_len, "--report", "--config", out.config(data), "--out", out / clips]
                steps.append(out.step(clips, words, prepare=partial(self._write_data, clips)))
        trained: dict[str, Path] = {}
        for name in self.base.models:
            write = partial(self._write_training, name)
            words = ["train", "--config", out.config(name), "--resume"]
            steps.append(out.step(name, words, processes=self.processes, prepare=write))
            trained[name] = out / name / "export" / name
            if self.mode == "lora":
                adapter = out / name / "export/adapter"
                trained[name] = out / "merged" / name
                words = ["merge", start / name, "--adapter", adapter, "--out", trained[name], "--overwrite"]
                steps.append(out.step(f"merge_{name}", words))
        bundle: dict[str, str | Path] = {
            "--text": text,
            "--tokenizer": tokenizer,
            "--trunk": trained.get("trunk", trained["sequential"]),
            "--sequential": trained["sequential"],
            "--interpolation": trained["interpolation"],
            **{f"--{part}": start / name for part, name in UPSCALING.items() if (self.base.path / name).is_dir()},
            "--sampling": out.config("sampling"),
            **self._clusters(),
            "--out": out / "bundle",
        }
        steps.append(bundle_step(out, bundle, self.captions, self._write_sampling))
        steps.append(samples_step(out, "before", self.base.path, self.captions))
        steps.append(samples_step(out, "after", out / "bundle", self.captions))
        return steps

    @property
    def processes(self) -> int:
        return max(1, self.num_gpus)

    def batch_size(self, name: str) -> int:
        """Clips per step of a training run, over all processes."""
        return batch_size(BATCHES[name], self.num_gpus)

    def _clusters(self) -> dict[str, str | Path]:
        """Options for the clusters of image codes: the base's own, or as many as it is sampled with."""
        options = {"--clusters": IMAGE_TOKENIZER, "--high-res-clusters": HIGH_RES_TOKENIZER}
        default = str(min(PUBLISHED_CLUSTERS, len(self.base.image.codebook)))
        return {
            option: self.start / CLUSTERS[folder] if (self.base.path / CLUSTERS[folder]).is_file() else default
            for option, folder in options.items()
            if (self.base.path / folder).is_dir()
        }

    def _write_data(self, clips: str) -> None:
        name, lengths = "sequential", list(self.base.clip_seconds(self.survey))
        if clips != "clips":
            name, lengths = "interpolation", list(self.base.between_seconds(self.survey))
        elif self.base.has_one_clip_size:
            lengths = sorted({*lengths, *self.base.between_seconds(self.survey)}, reverse=True)
        self.folder.write_config(
            CLIPS[clips],
            "How videos are cut, as the weights expect it.",
            {
                "frame_pixels": self.base.pixels,
                "clips": {"policy": "all", "clip_seconds": lengths, "num_frames": self.base.models[name].num_frames},
            },
        )

    def _write_training(self, name: str) -> None:
        between = name == "interpolation" and not self.base.has_one_clip_size
        data = self.folder / ("clips_between" if between else "clips")
        rows = int(read_manifest(data, "tokens")["rows"])
        values = self.training_values(name)
        settings = training_settings(
            self.folder,
            name,
            rows,
            values,
            data=[data],
            validation=[data / "validation"] if holds_out(self.survey) else None,
            batch_size=self.batch_size(name),
            processes=self.processes,
            steps=None if self.minutes is not None else STEPS[name],
        )
        self.folder.write_config(name, TITLES[name], settings)

    def training_values(self, name: str) -> dict[str, Any]:
        """The settings of a training run that depend on the bundle and the machine."""
        model = to_dict(self.base.models[name])
        for derived in ("task", "vocabulary", *FROM_DATA):
            del model[derived]
        values: dict[str, Any] = {
            "task": self.base.models[name].task,
            "model": model,
            "data": {
                "text_tokenizer": describe(self.start / "text.model"),
                "image_tokenizer": describe(self.start / "image_tokenizer"),
                "guidance_dropout": 0.1,
            },
            "init": {"checkpoint": describe(self.start / name)},
            "optimiser": {"lr": LEARNING_RATES[self.mode]},
            "train": {"dtype": "bf16" if self.bf16 else "fp32"},
        }
        if name == "sequential":
            values["data"]["clip_seconds"] = list(self.base.clip_seconds(self.survey)[:3])
        elif name == "interpolation":
            values["data"]["clip_seconds"] = list(self.base.between_seconds(self.survey))
        if self.base.config.prompt != PromptFormat():
            values["data"]["prompt"] = to_dict(self.base.config.prompt)
        if self.mode == "lora":
            values["lora"] = {"rank": RANK}
            if self.new_pieces:  # by default word embeddings have no adapter
                parts = ["spatial", "mlp", "embeddings"]
                values["lora"]["targets"] = parts if name == "trunk" else ["temporal", *parts]
        if self.num_gpus:
            values["train"] |= {"micro_batch_size": "auto", "recompute": "auto", "weights": "dtype"}
        return values

    def _write_sampling(self) -> None:
        sampling = settings_to_store(self.base.sampling, self.base.upsampling)
        for loading in ("weights", "device", "stream_layers", "compile"):
            del sampling[loading]
        self.folder.write_config("sampling", "The settings of the bundle that was finetuned.", sampling)


def choose_mode(recipe: FinetuneRecipe, machine: Machine) -> tuple[Mode, str]:
    """Choose "all" if the machine can train all weights of stage 1, which no other model exceeds in size.

    Returns the mode, and a sentence that says why.
    """
    name = "sequential"
    values, model = recipe.training_values(name), recipe.base.models[name]
    settings = {
        **values,
        "model": {**values["model"], **{size: getattr(model, size) for size in FROM_DATA}},
        "data": {},
        "train": {**values["train"], "batch_size": recipe.batch_size(name)},
    }
    adapters = f"adapters of rank {RANK} are trained"
    try:
        config = resolve_auto(from_dict(TrainConfig, settings), machine, recipe.processes)
    except NothingFits as error:
        return "lora", f"training all weights takes too much memory ({error}): {adapters}"
    budget = training_budget(model, machine, planned_settings(config, recipe.processes))
    needs = f"{budget.total / 2**30:.1f} of {machine.memory_bytes / 2**30:.1f} GiB"
    if not budget.fits(machine):
        return "lora", f"training all weights needs {needs}: {adapters}"
    return "all", f"all weights are trained: {needs} by the planner's estimate"
