"""Measure a model's clips.

    cogvideo eval digits [--model DIR] [--json FILE] [key=value ...]     clips of 200 test captions
    cogvideo eval digits --real [--tokenizer DIR]                        real clips and their reconstructions only

The moving-digits benchmark. Probes that know nothing of the model measure digit, colour, direction, displacement per
frame at each clip length, and smoothness. They also measure the captions' real clips, and those after the tokenizer's
round trip, which is the ceiling. Settings are those of `cogvideo sample`, such as seed=1 key_frames.guidance_scale=2,
and override the ones that come with the weights.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import add_config_arguments

if TYPE_CHECKING:
    from cogvideo.tokenizers.image import ImageTokenizer
    from cogvideo.worlds.digits.benchmark import Generate

# With other values, the clips would not match what the captions ask for.
FIXED_SETTINGS = ("seconds", "rounds", "samples_per_prompt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("protocol", choices=["digits"], help="what to measure")
    parser.add_argument("--model", metavar="DIR", type=Path, help="bundle of weights (default: the one in the package)")
    parser.add_argument("--num-prompts", metavar="N", type=int, default=200, help="test captions (default 200)")
    parser.add_argument("--captions-seed", metavar="N", type=int, default=0, help="seed of the captions (default 0)")
    parser.add_argument("--real", action="store_true", help="measure real clips and their reconstructions only")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="with --real: another image tokenizer")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all figures to this file")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.files import write_json
    from cogvideo.locks import lock_output
    from cogvideo.logs import get_logger
    from cogvideo.worlds.digits.benchmark import DigitBenchmarkConfig, format_table, run_benchmark

    benchmark = DigitBenchmarkConfig(args.num_prompts, args.captions_seed)
    if args.tokenizer and not args.real:
        raise ValueError("--tokenizer goes with --real; generated clips are decoded by their model's own tokenizer")
    if args.real and (args.overrides or args.config):
        raise ValueError("--real samples nothing, so sampling settings have no effect; leave them out")
    for override in args.overrides:
        if override.partition("=")[0] in FIXED_SETTINGS:
            raise ValueError(f"{override}: the benchmark sets {', '.join(FIXED_SETTINGS)} itself; leave it out")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json} cannot be written; name a file in a folder that exists")

    tokenizer, generate, about = _real_clips(args) if args.real else _model_clips(args)
    with lock_output(args.json) if args.json else nullcontext():
        results = run_benchmark(benchmark, tokenizer, generate, get_logger("eval").info)
        print(format_table(results))
        if args.json:
            write_json(args.json, {**about, **results.to_json()})


def _real_clips(args: argparse.Namespace) -> "tuple[ImageTokenizer, None, dict[str, Any]]":
    from cogvideo.tokenizers.image import open_image_tokenizer

    folder = args.tokenizer or _bundle(args) / "image_tokenizer"
    return open_image_tokenizer(folder), None, {"tokenizer": str(args.tokenizer or args.model or "bundled")}


def _model_clips(args: argparse.Namespace) -> "tuple[ImageTokenizer, Generate, dict[str, Any]]":
    from cogvideo.config import to_dict
    from cogvideo.sampling.bundle import load_sample_config
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.worlds.digits.benchmark import generate_with

    config = load_sample_config(_bundle(args), args.config, args.overrides)
    pipeline = Pipeline.load(_bundle(args), config)
    about = {"model": str(args.model or "bundled"), "sampling": to_dict(config)}
    return pipeline.image_tokenizer, generate_with(pipeline, config), about


def _bundle(args: argparse.Namespace) -> Path:
    from cogvideo.files import BUNDLED_WEIGHTS

    return args.model or BUNDLED_WEIGHTS
