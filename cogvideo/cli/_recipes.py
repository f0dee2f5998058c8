"""What `pretrain` and `finetune` share: arguments, the machine's resources, and the contents of recipe.json."""

import argparse
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import add_captions_arguments

if TYPE_CHECKING:
    from cogvideo.data.captions import CaptionsFile

COLUMNS = ("video_column", "caption_column", "start_column", "end_column", "encoding")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    add_captions_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, or to continue")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, metavar="N", help="fit everything into this time (default: as long as it takes)"
    )
    length.add_argument("--gpu-hours", type=float, metavar="N", help="the same, in GPU hours")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: GPUs if there are any"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads per process (default: all cores)")
    parser.add_argument("--dry-run", action="store_true", help="print the choices and the commands, and write nothing")


@dataclass(frozen=True)
class Resources:
    """The machine, and how long to use it."""

    num_gpus: int
    bf16: bool
    """Whether the machine has native bfloat16 matrix products."""
    threads: int | None
    minutes: float | None

    @property
    def deadline(self) -> float | None:
        """End of the available time by `time.monotonic`, counted from now; None without a limit."""
        return None if self.minutes is None else time.monotonic() + 60 * self.minutes

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that the steps' commands get in addition to this process's environment."""
        return {} if self.num_gpus else {"CUDA_VISIBLE_DEVICES": ""}


def resources_from(args: argparse.Namespace) -> Resources:
    """The resources that the arguments ask for. Raises: ValueError for invalid values, or GPUs where there are none."""
    import torch

    from cogvideo.training.resources import has_native_matmul

    for name, value in (("--minutes", args.minutes), ("--gpu-hours", args.gpu_hours), ("--threads", args.threads)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} {value:g}; expected a number above 0")
    num_gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    if not num_gpus and (args.device == "cuda" or args.gpu_hours is not None):
        wish = "--gpu-hours" if args.gpu_hours is not None else "--device cuda"
        raise ValueError(f"{wish} needs a GPU, and torch sees none here; give --minutes, or leave it out")
    minutes = 60 * args.gpu_hours / num_gpus if args.gpu_hours is not None else args.minutes
    device = torch.device("cuda" if num_gpus else "cpu")
    return Resources(num_gpus, has_native_matmul(device, torch.bfloat16), args.threads, minutes)


def open_captions_from(args: argparse.Namespace) -> "CaptionsFile":
    """Open the captions, skipping unusable records, which `cogvideo prepare` lists."""
    from cogvideo.cli._common import read_options_from
    from cogvideo.data.readers import open_captions

    return open_captions(args.captions, read_options_from(args), skip_bad=True)


def captions_words(args: argparse.Namespace) -> tuple[str, ...]:
    """`--captions FILE` and its options, as words for the command lines of other commands."""
    words = ["--captions", str(args.captions)]
    for name in COLUMNS:
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", getattr(args, name)]
    return tuple(words)


def begun_with(args: argparse.Namespace, resources: Resources, **choices: Any) -> dict[str, Any]:
    """What recipe.json records; a recipe can only be continued with the same values."""
    given = {"captions": os.path.abspath(args.captions)}
    given |= {name: getattr(args, name) for name in (*COLUMNS, "minutes", "gpu_hours")}
    return {"folder": os.getcwd(), **given, "device": "cuda" if resources.num_gpus else "cpu", **choices}
