"""Generate videos from captions.

    cogvideo sample "the red digit 3 moves left slowly" --out DIR [seed=7 samples_per_prompt=4 ...]
    cogvideo sample --prompts FILE --out DIR                 one prompt per line
    cogvideo sample --interactive --out DIR                  prompts from standard input, each into a folder of its own
    cogvideo sample PROMPT --first-frame FILE --out DIR      start from a picture, or the first frame of a video
    cogvideo sample PROMPT --continue FILE --out DIR         continue a video, or saved tokens
    cogvideo sample PROMPT --adapter DIR[:SCALE] --out DIR   with an adapter that a finetuning run exported
    cogvideo sample PROMPT --upsample --out DIR              then at a higher resolution, in DIR/large
    torchrun --nproc-per-node 2 -m cogvideo sample --prompts FILE --out DIR     in several processes; or with deepspeed

Each sample gets an .mp4, a looping .gif and a contact sheet .png; tokens.safetensors, samples.json and config.yaml
describe all samples. Videos and sheets appear with the first frames and are replaced as clips grow. After an
interruption, the same command with --resume continues from the last finished batch. The same seed gives the same
videos, regardless of the other prompts. docs/guides/sample.md lists the settings.
"""

import argparse
from pathlib import Path

from cogvideo.cli._sampling import (
    add_adapter_argument,
    add_run_arguments,
    load_configs,
    read_given_clips,
    refuse_rounds_without_model,
    refuse_unused_settings,
    run_job,
    unused_when_sampling,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="PROMPT or key=value", help="what to show; a setting, e.g. seed=7")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="more prompts, one per line")
    parser.add_argument("--interactive", action="store_true", help="read prompts and settings from standard input")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--first-frame", metavar="FILE", type=Path, help="picture, video or saved tokens to start from")
    given.add_argument("--continue", dest="continue_from", metavar="FILE", type=Path, help="video or saved tokens")
    add_adapter_argument(parser)
    parser.add_argument(
        "--upsample", action="store_true", help="also make large clips, with the bundle's super-resolution models"
    )
    parser.add_argument("--adapters-apart", action="store_true", help="compute adapters beside the weights: slower")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.config import split_overrides
    from cogvideo.distributed import ProcessGroup
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.sampling.adapters import AdapterChoice
    from cogvideo.sampling.jobs import check_upsampling, clip_job
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.sampling.superres import Upsampler
    from cogvideo.text import read_prompts

    processes = ProcessGroup.from_environment()
    prompts, overrides = split_overrides(args.words)
    if args.prompts is not None:
        prompts += read_prompts(args.prompts)
    refuse_unused_settings(overrides, unused_when_sampling(args, has_prompts=bool(prompts) or args.interactive))
    if args.adapters_apart and not args.adapter:
        raise ValueError("--adapters-apart goes with --adapter; leave it out")
    if args.interactive:
        for conflict, description in (
            (prompts, "a prompt"),
            (args.resume, "--resume"),
            (args.dry_run, "--dry-run"),
            (processes.size > 1, "more than one process"),
        ):
            if conflict:
                raise ValueError(f"--interactive reads prompts from standard input; leave out {description}")
    directory = args.model or BUNDLED_WEIGHTS
    config, upsample_config = load_configs(args, overrides)
    upsampler = None if upsample_config is None else Upsampler.load(directory, upsample_config)
    if upsampler is not None and upsampler.iterative is None:
        refuse_rounds_without_model(overrides, "upsample.")
    adapters = args.adapter = [AdapterChoice.parse(text) for text in args.adapter]
    pipeline = Pipeline.load(directory, config)
    for number, adapter in enumerate(adapters):
        pipeline.add_adapter(str(number), adapter.folder)
    if adapters:
        scales = {str(number): adapter.scale for number, adapter in enumerate(adapters)}
        pipeline.set_adapters(scales, merge=not args.adapters_apart)
    if args.interactive:
        from cogvideo.cli.interactive import run_interactive

        run_interactive(args, pipeline, upsampler, overrides)
        return
    job = clip_job(pipeline, config, prompts, read_given_clips(args, pipeline, config))
    if upsampler is not None:
        check_upsampling(job, upsampler)
    run_job(args, job, args.out, processes, upsampler=upsampler)
