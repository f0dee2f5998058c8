"""Evaluate clips: a model's against real ones by a named protocol, or on a benchmark of a synthetic world.

    cogvideo eval PROTOCOL --real DIR --generated DIR [--network i3d=FILE] [--tokenizer DIR] [--seeds N] [--json FILE]
    cogvideo eval PROTOCOL --real DIR --tokenizer DIR [--network i3d=FILE]    reconstructed clips in place of generated
    cogvideo eval PROTOCOL --real DIR --model DIR --prompts FILE [--network i3d=FILE] [key=value ...]
    torchrun --nproc-per-node 2 -m cogvideo eval PROTOCOL --cache DIR ...     in several processes
    cogvideo eval digits [--model DIR] [--cache DIR] [--json FILE] [key=value ...]    clips of 200 test captions
    cogvideo eval bodies --model DIR [--split unseen] [--continued] [--cache DIR] [--report FILE] [key=value ...]
    cogvideo eval digits|bodies --real [--tokenizer DIR]                 real clips and their reconstructions only
    cogvideo eval --self-test [--network i3d=FILE]                       known values of all measures
    cogvideo eval --compare A.json B.json                                two results side by side

A protocol fixes everything that affects a number. Its hash is printed beside every number, and numbers with different
hashes are not compared. `local` takes any clips, and needs no network. A network is a file that you provide, checked by
its SHA-256 before it is loaded. Clips are folders of videos, folders of frames, or results of `cogvideo sample`.

`digits` and `bodies` are benchmarks of synthetic worlds. Probes that are independent of the model measure, in `digits`,
digit, colour, direction, displacement per frame at each clip length, and smoothness; in `bodies`, colours, shapes, who
moves, direction, speed, who hides whom, contact, falls, gravity and permanence. They also measure the captions' real
clips, and the tokenizer's reconstructions of them, which are the ceiling. Settings are those of `cogvideo sample`, such
as seed=1 key_frames.guidance_scale=2, and override those that come with the weights.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import (
    add_captions_arguments,
    add_config_arguments,
    captions_files,
    refuse_replaced_inputs,
    weights,
)
from cogvideo.cli._eval_protocol import LOCAL, bundle_of, open_files, run_protocol, sample_config
from cogvideo.hub import describe

if TYPE_CHECKING:
    import torch

    from cogvideo.tokenizers.image import ImageTokenizer
    from cogvideo.worlds.benchmark import Benchmark, Generate

# With other values, the clips would not match what the captions ask for.
FIXED_SETTINGS = ("seconds", "rounds", "samples_per_prompt")
DIGITS, BODIES = "digits", "bodies"
NAMES = (
    *("tats-2048x16-128", "styleganv-2048x16", "ucf101-2048", "ucf101-10000", "kinetics600-5to11-64"),
    *("msrvtt-2990", "msrvtt-59794"),
    *(LOCAL, DIGITS, BODIES),
)
WORLD_OPTIONS = ("num_prompts", "captions_seed")
TAKEN_BY_WORLDS = (
    *("real", "model", "tokenizer", "device", "batch", "cache", "json", "report", "distances", "config", "overrides"),
    *WORLD_OPTIONS,
)
OPTIONS_OF = {DIGITS: ("palette",), BODIES: ("split", "continued")}
TAKEN_BY: dict[str, tuple[str, ...]] = {
    "--self-test": ("network", "trust_network", "device"),
    "--compare": (),
    **{world: (*TAKEN_BY_WORLDS, *options) for world, options in OPTIONS_OF.items()},
}
"""The options that have an effect in each mode; protocols take all but those of worlds."""
DEFAULTS = {"seeds": 1, "batch": 8, "num_prompts": 200, "captions_seed": 0, "palette": "basic", "split": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("protocol", nargs="?", choices=NAMES, help="what to measure")
    parser.add_argument(
        "--real",
        metavar="DIR",
        nargs="?",
        const=True,
        type=Path,
        help="real clips; digits, bodies: no DIR, measure real clips and their reconstructions only",
    )
    parser.add_argument("--generated", metavar="DIR", type=Path, help="generated clips")
    parser.add_argument(
        "--model", metavar="DIR", type=weights, help="bundle of weights (default for digits: the bundled one)"
    )
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="with --model: one prompt per line, used in turn")
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=weights, help="image tokenizer: reads tokens, and gives the ceiling"
    )
    parser.add_argument(
        "--scores", metavar="FILE", type=Path, help="what `cogvideo score` wrote: adds the tokens' likelihood"
    )
    parser.add_argument(
        "--network",
        metavar="ROLE=FILE",
        action="append",
        default=[],
        help="i3d, c3d, lpips_alex or lpips_vgg, TorchScript; inception or clip, weights",
    )
    parser.add_argument(
        "--trust-network", action="store_true", help="load unknown files, which can run code; results record it"
    )
    parser.add_argument(
        "--distances",
        action=argparse.BooleanOptionalAction,
        help="appearance and motion distance, by networks of the extra [distances] (default: if it is installed)",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=int, help="repeats with different clips and start frames (default 1)"
    )
    parser.add_argument(
        "--seam", metavar="N", type=int, help="measure the seam at this frame, where the continuation begins"
    )
    parser.add_argument("--cache", metavar="DIR", type=Path, help="keep features and sampled clips here for reuse")
    parser.add_argument("--batch", metavar="N", type=int, help="clips that a network reads at once (default 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all figures to this file")
    parser.add_argument("--report", metavar="FILE", type=Path, help="also write an HTML page with clips to look at")
    parser.add_argument("--self-test", action="store_true", help="check measures and networks against known values")
    parser.add_argument(
        "--compare",
        metavar="FILE",
        nargs=2,
        type=Path,
        help="two files that --json wrote for the same protocol or benchmark",
    )
    captions = parser.add_argument_group("captions", "captions of videos by their paths in the folder, for CLIPSIM")
    add_captions_arguments(captions, required=False)
    local = parser.add_argument_group("local", "options of the protocol `local`")
    local.add_argument(
        "--clips", metavar="N", type=int, help="clips on each side (default: as many as the smaller side has)"
    )
    local.add_argument("--frames", metavar="N", type=int, help="frames per clip (default 16)")
    local.add_argument("--stride", metavar="N", type=int, help="take every N-th frame (default 1)")
    local.add_argument("--fps", metavar="N", type=float, help="take N frames per second (default: all)")
    local.add_argument("--side", metavar="PX", type=int, help="height and width of frames (default 128)")
    local.add_argument("--crop", choices=["center", "squash"], help="how frames become square (default center)")
    worlds = parser.add_argument_group("synthetic worlds", "options of the benchmarks `digits` and `bodies`")
    worlds.add_argument("--num-prompts", metavar="N", type=int, help="test captions (default 200)")
    worlds.add_argument("--captions-seed", metavar="N", type=int, help="seed of the captions (default 0)")
    worlds.add_argument("--palette", choices=["basic", "new"], help="digits: colours of the captions (default basic)")
    worlds.add_argument(
        "--split",
        choices=["test", "unseen"],
        help="bodies: combinations that training shows (test, the default) or never shows (unseen)",
    )
    worlds.add_argument("--continued", action="store_true", help="bodies: also continue clips to 12 s")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int | None:
    from cogvideo.distributed import ProcessGroup

    if isinstance(args.real, Path) and str(args.real) in NAMES and args.protocol is None:
        args.protocol, args.real = str(args.real), True  # `eval --real digits`
    for file in (args.json, args.report):
        if file and (file.is_dir() or not file.parent.is_dir()):
            option = "--json" if file is args.json else "--report"
            raise ValueError(f"{option} {file} cannot be written; name a file in a folder that exists")
    if args.json and args.json == args.report:
        raise ValueError("--json and --report name the same file; give two")
    if (args.self_test or args.compare) and (args.protocol or (args.self_test and args.compare)):
        raise ValueError("--self-test, --compare and a protocol exclude each other; give one of them")
    if not (args.self_test or args.compare or args.protocol):
        raise ValueError(f"name a protocol: {', '.join(NAMES)}; or give --self-test or --compare")
    _refuse_unused(args)
    for option, output in (("--json", args.json), ("--report", args.report)):
        if output is not None:
            refuse_replaced_inputs(option, output, _inputs(args, output), [args.model, args.tokenizer])
    if args.protocol in (None, *OPTIONS_OF) and ProcessGroup.from_environment().size > 1:
        raise ValueError("only protocols with --cache run in several processes; start this without a launcher")
    if args.self_test:
        return _self_test(args)
    if args.compare:
        _compare_files(*args.compare)
    elif args.protocol in OPTIONS_OF:
        _run_world(args)
    else:
        run_protocol(args)
    return None


def _inputs(args: argparse.Namespace, output: Path) -> list[Path]:
    """The files that are read, including `output` if it is a file of a folder of clips."""
    from cogvideo.data.readers.delimited import MEDIA_SUFFIXES
    from cogvideo.evaluation.networks import parse_networks
    from cogvideo.sampling.inputs import TOKENS_FILE
    from cogvideo.sampling.outputs import SAMPLES_FILE

    files = [*filter(None, (args.scores, args.prompts)), *args.config, *parse_networks(args.network).values()]
    files += captions_files(args.captions) if args.captions else []
    for folder in (args.real, args.generated):
        if isinstance(folder, Path):
            files += [folder, folder / TOKENS_FILE, folder / SAMPLES_FILE]
            if output.suffix.lower() in MEDIA_SUFFIXES and folder.resolve() in output.resolve().parents:
                files.append(output)
    return files


def _refuse_unused(args: argparse.Namespace) -> None:
    """Set defaults. Raises: ValueError for an option that would have no effect."""
    from cogvideo.evaluation.packaged_networks import are_wanted
    from cogvideo.evaluation.protocols import PROTOCOLS

    mode = "--self-test" if args.self_test else "--compare" if args.compare else args.protocol
    of_worlds = {*WORLD_OPTIONS, *(option for options in OPTIONS_OF.values() for option in options)}
    for name, value in vars(args).items():
        if name in ("protocol", "self_test", "compare") or value is None or value is False or value == []:
            continue
        if name in of_worlds if mode not in TAKEN_BY else name not in TAKEN_BY[mode]:
            option = "key=value" if name == "overrides" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no effect on {mode}; leave it out")
    for override in args.overrides:
        takes_frames = args.continued or (mode in PROTOCOLS and PROTOCOLS[mode].given_frames)
        if override.partition("=")[0] == "given_frames" and not takes_frames:
            raise ValueError(f"{override} has no effect on {mode}, which gives the model no frames; leave it out")
    if args.batch is not None and not 1 <= args.batch <= 1000:
        raise ValueError(f"--batch {args.batch}: give 1 to 1000")
    if args.batch is not None and mode in OPTIONS_OF and not are_wanted(args.distances):
        raise ValueError("--batch is for the networks of --distances, and none are used; leave it out")
    if args.trust_network and not args.network:
        raise ValueError("--trust-network goes with --network; leave it out")
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _run_world(args: argparse.Namespace) -> None:
    from cogvideo.cli._common import device_from
    from cogvideo.evaluation.packaged_networks import open_wanted
    from cogvideo.files import write_json
    from cogvideo.locks import lock_output
    from cogvideo.logs import get_logger
    from cogvideo.worlds.benchmark import format_table, run_benchmark, write_report

    benchmark = _benchmark(args)
    if args.tokenizer and not args.real:
        raise ValueError("--tokenizer goes with --real; generated clips are decoded by their model's own tokenizer")
    if args.real and (args.overrides or args.config or args.cache or args.real is not True):
        raise ValueError(
            f"{benchmark.name} --real takes no folder and samples nothing, so settings and --cache have no effect; "
            "leave them out"
        )
    if args.tokenizer and args.model:
        raise ValueError("--model has its own image tokenizer; leave out --tokenizer")
    if args.protocol == BODIES and not (args.model or args.tokenizer):
        raise ValueError("the package includes no weights for the bodies world; give --model, or --real --tokenizer")
    for override in args.overrides:
        if override.partition("=")[0] in FIXED_SETTINGS:
            raise ValueError(f"{override}: the benchmark sets {', '.join(FIXED_SETTINGS)} itself; leave it out")
    device = device_from(args.device)
    networks = open_wanted(args.distances, device)
    tokenizer, generate, about = _real_clips(args, device) if args.real else _model_clips(args, benchmark)
    with ExitStack() as stack:
        for file in filter(None, (args.json, args.report)):
            stack.enter_context(lock_output(file))
        results = run_benchmark(
            benchmark, tokenizer, generate, get_logger("eval").info, networks=networks, batch=args.batch
        )
        print(format_table(results))
        if args.json:
            write_json(args.json, {**about, **results.to_json()})
        if args.report:
            write_report(args.report, results)


def _benchmark(args: argparse.Namespace) -> "Benchmark":
    if args.protocol == DIGITS:
        from cogvideo.worlds.digits.benchmark import DigitsBenchmark

        return DigitsBenchmark(args.num_prompts, args.captions_seed, palette=args.palette)
    from cogvideo.worlds.bodies.benchmark import BodiesBenchmark

    return BodiesBenchmark(args.num_prompts, args.captions_seed, args.split, args.continued)


def _real_clips(args: argparse.Namespace, device: "torch.device") -> "tuple[ImageTokenizer, None, dict[str, Any]]":
    from cogvideo.tokenizers.image import open_image_tokenizer

    tokenizer = open_image_tokenizer(args.tokenizer or bundle_of(args) / "image_tokenizer")
    tokenizer.model.to(device)
    return tokenizer, None, {"tokenizer": describe(args.tokenizer or args.model or "bundled")}


def _model_clips(args: argparse.Namespace, benchmark: "Benchmark") -> "tuple[ImageTokenizer, Generate, dict[str, Any]]":
    from cogvideo.config import to_dict
    from cogvideo.sampling.bundle import fingerprint
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.worlds.benchmark import generate_with

    config = sample_config(args)
    pipeline = Pipeline.load(bundle_of(args), config)
    if args.cache:
        args.cache.mkdir(parents=True, exist_ok=True)
    generate = generate_with(
        pipeline, config, benchmark.side, weights=fingerprint(bundle_of(args)) if args.cache else "", cache=args.cache
    )
    about = {"model": describe(args.model or "bundled"), "sampling": to_dict(config)}
    return pipeline.image_tokenizer, generate, about


def _self_test(args: argparse.Namespace) -> int:
    from cogvideo.cli._common import device_from
    from cogvideo.evaluation.networks import parse_networks
    from cogvideo.evaluation.self_test import run_self_test

    device = device_from(args.device)
    networks = open_files(parse_networks(args.network), device, args.trust_network)
    wrong = 0
    for check in run_self_test(networks):
        print(check, flush=True)
        wrong += not check.passed
    print(f"{wrong} wrong" if wrong else "all as expected")
    return 1 if wrong else 0


def _compare_files(left: Path, right: Path) -> None:
    from cogvideo.evaluation.comparison_report import format_files

    print(format_files(left, right))
