"""Measure a model's clips.

    cogvideo eval digits [--model DIR] [--json FILE] [key=value ...]     clips of 200 test captions
    cogvideo eval digits --real [--tokenizer DIR]                        no sampling: the ceiling alone

The embedded benchmark: probes that know nothing of the model judge digit, colour, direction, displacement a frame at
each clip length, and smoothness, beside the same clips through the tokenizer alone and the real clips. Settings are
those of `cogvideo sample`, over the ones that come with the weights, e.g. seed=1 key_frames.guidance_scale=2.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import add_config_arguments

if TYPE_CHECKING:
    import numpy as np

    from cogvideo.sampling.config import SampleConfig
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.tokenizers.image import ImageTokenizer

    Generate = Callable[[list[str], str], np.ndarray | None]

# The benchmark says these itself: other values would compare clips with captions of another kind.
FIXED_SETTINGS = ("seconds", "rounds", "samples_per_prompt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("protocol", choices=["digits"], help="what to measure")
    parser.add_argument(
        "--model", metavar="DIR", type=Path, help="a bundle of weights (default: the one in the package)"
    )
    parser.add_argument("--num-prompts", metavar="N", type=int, default=200, help="test captions (default 200)")
    parser.add_argument("--captions-seed", metavar="N", type=int, default=0, help="which test captions are drawn")
    parser.add_argument("--real", action="store_true", help="judge real clips and their reconstructions only")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="with --real: another image tokenizer")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure here too")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.files import write_json
    from cogvideo.logs import get_logger
    from cogvideo.worlds.digits.benchmark import DigitBenchmarkConfig, run_benchmark, table

    benchmark = DigitBenchmarkConfig(args.num_prompts, args.captions_seed)
    if args.tokenizer and not args.real:
        raise ValueError("--tokenizer goes with --real; generated clips are decoded by their model's own tokenizer")
    if args.real and (args.overrides or args.config):
        raise ValueError("--real samples nothing, so settings of sampling have no meaning; leave them out")
    for word in args.overrides:
        if word.partition("=")[0] in FIXED_SETTINGS:
            raise ValueError(f"{word}: the benchmark sets {', '.join(FIXED_SETTINGS)} itself; leave it out")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json} is not a place for a file; name a file in a folder that exists")

    tokenizer, generate, about = _real(args) if args.real else _model(args)
    results = run_benchmark(benchmark, tokenizer, generate, get_logger("eval").info)
    print(table(results))
    if args.json:
        write_json(args.json, {**about, **results.to_json()})


def _real(args: argparse.Namespace) -> "tuple[ImageTokenizer, None, dict[str, Any]]":
    from cogvideo.tokenizers.image import open_image_tokenizer

    folder = args.tokenizer or _bundle(args) / "image_tokenizer"
    return open_image_tokenizer(folder), None, {"tokenizer": str(args.tokenizer or args.model or "bundled")}


def _model(args: argparse.Namespace) -> "tuple[ImageTokenizer, Generate, dict[str, Any]]":
    from cogvideo.config import to_dict
    from cogvideo.sampling.bundle import load_sample_config
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.worlds.digits.render import CANVAS

    config = load_sample_config(_bundle(args), args.config, args.overrides)
    pipeline = Pipeline.load(_bundle(args), config)
    side = pipeline.sequential.config.frame_side * pipeline.image_tokenizer.compress_rate
    if side != CANVAS:
        raise ValueError(
            f"{_bundle(args)} makes frames of {side}x{side} pixels; the moving digits are {CANVAS}x{CANVAS}"
        )
    about = {"model": str(args.model or "bundled"), "sampling": to_dict(config)}
    return pipeline.image_tokenizer, _generator(pipeline, config), about


def _bundle(args: argparse.Namespace) -> Path:
    from cogvideo.files import BUNDLED_WEIGHTS

    return args.model or BUNDLED_WEIGHTS


def _generator(pipeline: "Pipeline", config: "SampleConfig") -> "Generate":
    """Frames of captions for each set of the benchmark; None for whole clips where there is no stage 2."""
    from dataclasses import replace

    from cogvideo.logs import progress
    from cogvideo.worlds.digits.benchmark import NUM_ROUNDS, WHOLE, seconds_of
    from cogvideo.worlds.digits.render import SECONDS

    def generate(captions: list[str], name: str) -> "np.ndarray | None":
        if name == WHOLE and pipeline.interpolation is None:
            return None
        seconds, rounds = (SECONDS, NUM_ROUNDS) if name == WHOLE else (seconds_of(name), 0)
        settings = replace(config, seconds=seconds, rounds=rounds, samples_per_prompt=1)
        with progress(pipeline.num_tokens(settings, len(captions)), "sampling", "token") as bar:
            return pipeline.decode(pipeline.sample(captions, settings, bar.update))

    return generate
