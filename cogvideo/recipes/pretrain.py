"""The recipe from captioned videos to a bundle of weights, with sizes that suit the data and the machine.

The steps are those of docs/guides/pretrain.md, "The same step by step": frames, image tokenizer, clips, text tokenizer,
trunk, both stages, bundle, samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideo.data.captions import CaptionsFile
from cogvideo.data.shards import read_manifest
from cogvideo.data.statistics import MAX_CAPTIONS, CaptionLengths, spread
from cogvideo.recipes.common import VALIDATION, batch_size, bundle_step, holds_out, samples_step, training_settings
from cogvideo.recipes.folder import RecipeFolder
from cogvideo.recipes.steps import Step, continuous_steps
from cogvideo.recipes.survey import Survey, text_length
from cogvideo.tokenizers.text import TextTokenizer

SHARES = {"tokenizer": 0.2, "trunk": 0.15, "sequential": 0.42, "interpolation": 0.23}
"""Share of the time that each training run gets."""
STEPS = {"tokenizer": 4000, "trunk": 2000, "sequential": 4000, "interpolation": 2000}
"""Length of each run, in steps, if no time is given."""
BATCHES = {"tokenizer": 8, "trunk": 16, "sequential": 8, "interpolation": 8}
"""Clips or frames per step on a CPU, where time is short and small batches learn more in it."""
FRAMES = 20_000
"""Target number of single frames for the image tokenizer; each video gives from 4 to MAX_FRAMES of them."""
MAX_FRAMES = 64
PIXELS = 64


@dataclass(frozen=True)
class Size:
    """A transformer's size, and the learning rate that suits it."""

    num_layers: int
    hidden_size: int
    num_heads: int
    lr: float


SMALL, MEDIUM, LARGE = Size(4, 256, 4, 8e-4), Size(8, 512, 8, 4e-4), Size(16, 1024, 16, 2e-4)
"""For a CPU; for a GPU; for a GPU with at least MANY captions."""
MANY = 5000


@dataclass(frozen=True)
class Choices:
    """The choices for given videos on a given machine."""

    pixels: int
    clip_seconds: tuple[float, ...]
    """Longest first, each half of the one before."""
    frames_per_video: int
    num_codes: int
    holds_out: bool
    """Whether some videos are held out for validation."""
    size: Size
    bf16: bool
    num_gpus: int

    @classmethod
    def of(cls, survey: Survey, *, pixels: int | None, num_gpus: int, bf16: bool) -> "Choices":
        """Raises: ValueError if no clip length suits the videos, or `pixels` is no multiple of 8."""
        if pixels is not None and (pixels < 16 or pixels % 8):
            raise ValueError(f"--pixels {pixels}; expected a multiple of 8, at least 16")
        frames = min(MAX_FRAMES, max(4, FRAMES // survey.num_videos))
        return cls(
            pixels=pixels or max(16, min(PIXELS, survey.short_side // 8 * 8)),
            clip_seconds=survey.clip_lengths(4),
            frames_per_video=frames,
            num_codes=1024 if survey.num_videos * frames >= 5000 else 256,
            holds_out=holds_out(survey),
            size=SMALL if not num_gpus else LARGE if survey.num_captions >= MANY else MEDIUM,
            bf16=bf16,
            num_gpus=num_gpus,
        )

    @property
    def processes(self) -> int:
        return max(1, self.num_gpus)

    @property
    def key_frame_seconds(self) -> tuple[float, ...]:
        """Clip lengths of stage 1."""
        return self.clip_seconds[:3]

    @property
    def between_seconds(self) -> tuple[float, ...]:
        """Clip lengths of stage 2: without the longest, if there are more, since its clips span half of stage 1's."""
        return self.clip_seconds[1:] or self.clip_seconds

    @property
    def rounds(self) -> int:
        """Rounds of interpolation of the longest clips that stage 2 is trained for."""
        return len(self.clip_seconds) - 1

    def __str__(self) -> str:
        size = self.size
        lengths = ", ".join(f"{seconds:g}" for seconds in self.clip_seconds)
        return (
            f"{self.pixels}x{self.pixels} pixels; clips of {lengths} s; {self.frames_per_video} frames per video for "
            f"an image tokenizer of {self.num_codes} codes; {size.num_layers} layers, width {size.hidden_size}, "
            f"{'bf16' if self.bf16 else 'fp32'}, {self.processes} process{'es' * (self.processes > 1)}; "
            + (f"{VALIDATION:.0%} of the videos held out" if self.holds_out else "nothing held out")
        )


@dataclass(frozen=True)
class PretrainRecipe:
    """The steps for given choices; all paths are in `folder`."""

    folder: RecipeFolder
    captions: CaptionsFile
    captions_words: tuple[str, ...]
    """`--captions FILE` and the options for reading it, as `cogvideo prepare` takes them."""
    choices: Choices
    minutes: float | None = None
    """The time that schedules are made to fill; None: their lengths are STEPS."""

    def steps(self) -> list[Step]:
        out, choices = self.folder, self.choices
        tokenizer, text = out / "tokenizer/export/image_tokenizer", out / "text.model"
        data = ("--config", str(out.config("data")))
        held_out = ("--validation", str(VALIDATION)) if choices.holds_out else ()

        def train(name: str, prepare: Callable[[], None]) -> Step:
            words = ("train", "--config", out.config(name), "--resume")
            return out.step(name, words, processes=choices.processes, prepare=prepare)

        def transformer(name: str, comment: str, values: dict[str, Any]) -> Step:
            def write() -> None:
                self._write_base()
                out.write_config(name, comment, {"base": "base.yaml", **self._training(name, "clips", values)})

            return train(name, write)

        prepare = ("prepare", *self.captions_words, *data, *held_out)
        trunk, sequential = out / "trunk/export/trunk", out / "sequential/export/sequential"
        bundle: dict[str, str | Path] = {
            "--text": text,
            "--tokenizer": tokenizer,
            "--trunk": trunk,
            "--sequential": sequential,
            "--interpolation": out / "interpolation/export/interpolation",
            "--sampling": out.config("sampling"),
            "--clusters": str(min(64, choices.num_codes)),
            "--out": out / "bundle",
        }
        return [
            out.step("frames", (*prepare, "--frames", "--out", out / "frames"), prepare=self._write_data),
            train("tokenizer", self._write_tokenizer),
            out.step("clips", (*prepare, "--tokenizer", tokenizer, "--out", out / "clips", "--report")),
            out.step(
                "vocabulary",
                ("vocabulary", *self.captions_words, "--tokenizer", tokenizer, "--out", text, "--overwrite"),
            ),
            transformer("trunk", "The text-to-image trunk, on single frames of the clips.", {"task": "image"}),
            transformer(
                "sequential",
                "Stage 1: five frames one after the other, starting from the trunk. It learns the first frame as\n"
                "well, since a trunk trained on few videos has seen little.",
                {
                    "task": "sequential",
                    "model": {"learn_first_frame": True},
                    "data": {"clip_seconds": list(choices.key_frame_seconds)},
                    "init": {"checkpoint": str(trunk)},
                },
            ),
            transformer(
                "interpolation",
                "Stage 2: two frames between three given ones, starting from stage 1.",
                {
                    "task": "interpolation",
                    "data": {"clip_seconds": list(choices.between_seconds)},
                    "init": {"checkpoint": str(sequential), "temporal": "copy"},
                },
            ),
            bundle_step(out, bundle, self.captions, self._write_sampling),
            samples_step(out, "samples", out / "bundle", self.captions),
        ]

    def _write_data(self) -> None:
        choices = self.choices
        self.folder.write_config(
            "data",
            "How videos are cut. Clips of five frames at every length that stage 1 and stage 2 learn.",
            {
                "frame_pixels": choices.pixels,
                "frames_per_video": choices.frames_per_video,
                "clips": {"policy": "all", "clip_seconds": list(choices.clip_seconds)},
            },
        )

    def _write_tokenizer(self) -> None:
        network: dict[str, Any] = {
            "channels": 16,
            "mid_attention": False,
            "num_codes": self.choices.num_codes,
            "relative_commitment": True,
        }
        values = self._training(
            "tokenizer",
            "frames",
            {
                "task": "tokenizer",
                "optimiser": {"lr": 2e-3, "betas": [0.9, 0.99], "weight_decay": 0.0},
                "tokenizer": network,
            },
        )
        if "steps" in values["train"]:
            network["continuous_steps"] = continuous_steps(values["train"]["steps"])
        side = self.choices.pixels
        self.folder.write_config("tokenizer", f"The image tokenizer: {side}x{side} pixels -> codes.", values)

    def _write_base(self) -> None:
        """Write the sizes of the transformers; the text length is found with the trained text tokenizer."""
        size, text = self.choices.size, self.folder / "text.model"
        sample = self.captions.select(spread(len(self.captions), MAX_CAPTIONS))
        lengths = CaptionLengths.of_clips([caption.text for caption in sample], TextTokenizer.load(text))
        text_len = text_length(lengths.lengths.tolist())
        self.folder.write_config(
            "base",
            "Shared by the three transformers. The size of frames is that of the data.",
            {
                "model": {
                    "num_layers": size.num_layers,
                    "hidden_size": size.hidden_size,
                    "num_heads": size.num_heads,
                    "text_len": text_len,
                    "frame_position_start": text_len,
                    "dropout": 0.0,
                    "attention_dropout": 0.0,
                },
                "data": {
                    "text_tokenizer": str(text),
                    "image_tokenizer": str(self.folder / "tokenizer/export/image_tokenizer"),
                    "guidance_dropout": 0.1,
                },
                "optimiser": {"lr": size.lr},
                "train": {
                    "dtype": "bf16" if self.choices.bf16 else "fp32",
                    **({"micro_batch_size": "auto", "recompute": "auto"} if self.choices.num_gpus else {}),
                },
            },
        )

    def _training(self, name: str, data: str, values: dict[str, Any]) -> dict[str, Any]:
        """The settings of a training run: `values`, and those that depend on the amount of data."""
        folder = self.folder / data
        rows = int(read_manifest(folder, "frames" if data == "frames" else "tokens")["rows"])
        return training_settings(
            self.folder,
            name,
            rows,
            values,
            data=[folder],
            validation=[folder / "validation"] if self.choices.holds_out else None,
            batch_size=batch_size(BATCHES[name], self.choices.num_gpus),
            processes=self.choices.processes,
            steps=None if self.minutes is not None else STEPS[name],
        )

    def _write_sampling(self) -> None:
        self.folder.write_config("sampling", *sampling_settings(self.choices.clip_seconds[0], self.choices.rounds))


def sampling_settings(seconds: float, rounds: int) -> tuple[str, dict[str, Any]]:
    """A comment and settings for `cogvideo sample` that suit small models: less random than the published ones."""
    between = {
        "temperature": 0.3,
        "top_k_clusters": 12,
        "token_temperature": 0.3,
        "text_bonus": 0.0,
        "video_suffix": True,
    }
    values = {
        "seconds": seconds,
        "rounds": rounds,
        "first_frame": {
            **{"temperature": 0.9, "top_k_clusters": 16, "token_temperature": 0.8, "guidance_scale": 2.0},
            **{"text_bonus": 0.0, "video_suffix": True},
        },
        "key_frames": {**between, "guidance_scale": 1.5},
        "interpolation": between,
    }
    return "How to sample: the longest clips that were learned, all rounds of interpolation.", values
