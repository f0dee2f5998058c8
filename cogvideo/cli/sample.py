"""Videos of captions.

    cogvideo sample "the red digit 3 moves left slowly" --out DIR [seed=7 samples_per_prompt=4 ...]
    cogvideo sample --prompts FILE --out DIR                 one prompt a line
    cogvideo sample --interactive --out DIR                  prompts as you type them, each in a folder of its own
    cogvideo sample PROMPT --first-frame FILE --out DIR      from a picture, or the first frame of a video
    cogvideo sample PROMPT --continue FILE --out DIR         what comes after a video, or after saved tokens
    torchrun --nproc-per-node 2 -m cogvideo sample --prompts FILE --out DIR     in many processes, also by deepspeed

Each sample gets an .mp4, a looping .gif and a contact sheet .png; tokens.safetensors, samples.json and config.yaml tell
what they are. Videos and sheets appear with the first frames and grow. Stopped, by Ctrl-C or otherwise, and run again
with --resume, it goes on from what was drawn. A seed repeats its videos, whatever other prompts are asked for.
docs/sampling.md lists the settings.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideo.cli._sampling import add_making_arguments, make

if TYPE_CHECKING:
    from cogvideo.sampling.config import SampleConfig
    from cogvideo.sampling.inputs import Footage
    from cogvideo.sampling.pipeline import Pipeline

MAX_PROMPT_FILE_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="PROMPT or key=value", help="what to show; a setting, e.g. seed=7")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="more prompts, one a line")
    parser.add_argument("--interactive", action="store_true", help="read prompts, and settings, from standard input")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--first-frame", metavar="FILE", type=Path, help="picture, video or saved tokens to begin with")
    given.add_argument("--continue", dest="goes_on", metavar="FILE", type=Path, help="a video or saved tokens to go on")
    add_making_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.cli._common import split_overrides
    from cogvideo.distributed import ProcessGroup
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.sampling.bundle import bundle_sample_config
    from cogvideo.sampling.checked_jobs import clip_job
    from cogvideo.sampling.pipeline import Pipeline

    processes = ProcessGroup.from_environment()
    prompts, overrides = split_overrides(args.words)
    if args.prompts is not None:
        prompts += read_prompts(args.prompts)
    if args.interactive:
        for unfit, said in (
            (prompts, "a prompt"),
            (args.resume, "--resume"),
            (args.dry_run, "--dry-run"),
            (processes.size > 1, "more than one process"),
        ):
            if unfit:
                raise ValueError(f"--interactive reads prompts from standard input; it does not go with {said}")
    directory = args.model or BUNDLED_WEIGHTS
    config = bundle_sample_config(directory, args.config, overrides)
    pipeline = Pipeline.load(directory, config)
    if args.interactive:
        from cogvideo.cli.interactive import converse

        converse(args, pipeline, overrides)
        return
    job = clip_job(pipeline, config, prompts, given_frames(args, pipeline, config))
    make(args, job, args.out, processes, config.samples_per_prompt if prompts else 1)


def given_frames(args: argparse.Namespace, pipeline: "Pipeline", config: "SampleConfig") -> "Footage | None":
    """The frames that the clips begin with."""
    from cogvideo.sampling.inputs import FootageReader

    reader = FootageReader(pipeline.image_tokenizer, pipeline.sequential.config.frame_side)
    if args.first_frame is not None:
        return reader.first_frame(args.first_frame)
    if args.goes_on is not None:
        return reader.to_continue(args.goes_on, pipeline.fps(config))
    return None


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, one a line, blank lines left out. Raises: ValueError, OSError."""
    if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_PROMPT_FILE_BYTES} bytes; expected a text file, one prompt a line"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; expected one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts
