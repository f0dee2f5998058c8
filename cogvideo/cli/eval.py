"""Measure clips: a model's against real ones by a named protocol, or on the moving-digits benchmark.

    cogvideo eval PROTOCOL --real DIR --generated DIR [--network i3d=FILE] [--tokenizer DIR] [--seeds N] [--json FILE]
    cogvideo eval PROTOCOL --real DIR --model DIR --prompts FILE [--network i3d=FILE] [key=value ...]
    cogvideo eval digits [--model DIR] [--json FILE] [key=value ...]     clips of 200 test captions
    cogvideo eval digits --real [--tokenizer DIR]                        real clips and their reconstructions only
    cogvideo eval --self-test [--network i3d=FILE]                       known values of all measures
    cogvideo eval --compare A.json B.json                                two results side by side

A protocol fixes all that moves a number; its hash is printed beside every one, and numbers of two hashes are not
compared. `local` takes any clips, and needs no network. A network is a TorchScript file that you bring, checked by its
SHA-256 before it is loaded. Clips are folders of videos, folders of frames, or results of `cogvideo sample`.

`digits` is the moving-digits benchmark. Probes that know nothing of the model measure digit, colour, direction,
displacement per frame at each clip length, and smoothness. They also measure the captions' real clips, and those after
the tokenizer's round trip, which is the ceiling. Settings are those of `cogvideo sample`, such as seed=1
key_frames.guidance_scale=2, and override the ones that come with the weights.
"""

import argparse
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import add_config_arguments

if TYPE_CHECKING:
    import torch

    from cogvideo.evaluation.networks import FeatureNetwork
    from cogvideo.evaluation.protocols import Protocol
    from cogvideo.evaluation.sources import ClipSource
    from cogvideo.tokenizers.image import ImageTokenizer
    from cogvideo.worlds.digits.benchmark import Generate

# With other values, the clips would not match what the captions ask for.
FIXED_SETTINGS = ("seconds", "rounds", "samples_per_prompt")
DIGITS, LOCAL = "digits", "local"
NAMES = (
    *("tats-2048x16-128", "styleganv-2048x16", "ucf101-2048", "ucf101-10000", "kinetics600-5to11-64"),
    *(LOCAL, DIGITS),
)
LOCAL_OPTIONS = ("clips", "frames", "stride", "fps", "side", "crop")
"""Options that set a field of the local protocol."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("protocol", nargs="?", choices=NAMES, help="what to measure")
    parser.add_argument(
        "--real",
        metavar="DIR",
        nargs="?",
        const=True,
        type=Path,
        help="real clips; digits: no DIR, measure real clips and their reconstructions only",
    )
    parser.add_argument("--generated", metavar="DIR", type=Path, help="generated clips")
    parser.add_argument("--model", metavar="DIR", type=Path, help="bundle of weights (digits: default the bundled one)")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="with --model: one prompt per line, used in turn")
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="image tokenizer: reads tokens, and gives the ceiling"
    )
    parser.add_argument(
        "--network", metavar="ROLE=FILE", action="append", default=[], help="i3d=FILE or c3d=FILE, TorchScript"
    )
    parser.add_argument("--trust-network", action="store_true", help="load unknown files, which run code; is recorded")
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="repeats with other clips and starts")
    parser.add_argument(
        "--seam", metavar="N", type=int, help="frame that a continued clip begins with: measure the seam"
    )
    parser.add_argument("--cache", metavar="DIR", type=Path, help="keep features here, and use those that are here")
    parser.add_argument("--batch", metavar="N", type=int, default=8, help="clips that a network reads at once")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all figures to this file")
    parser.add_argument("--report", metavar="FILE", type=Path, help="also write an HTML page with clips to look at")
    parser.add_argument("--self-test", action="store_true", help="check measures and networks against known values")
    parser.add_argument("--compare", metavar="FILE", nargs=2, type=Path, help="two files that --json wrote")
    local = parser.add_argument_group("local", "options of the protocol `local`")
    local.add_argument("--clips", metavar="N", type=int, help="clips on each side (default: as many as there are)")
    local.add_argument("--frames", metavar="N", type=int, help="frames per clip (default 16)")
    local.add_argument("--stride", metavar="N", type=int, help="take every N-th frame (default 1)")
    local.add_argument("--fps", metavar="N", type=float, help="take N frames per second (default: all)")
    local.add_argument("--side", metavar="PX", type=int, help="height and width of frames (default 128)")
    local.add_argument("--crop", choices=["center", "squash"], help="how frames become square (default center)")
    digits = parser.add_argument_group("digits", "options of the benchmark `digits`")
    digits.add_argument("--num-prompts", metavar="N", type=int, default=200, help="test captions (default 200)")
    digits.add_argument("--captions-seed", metavar="N", type=int, default=0, help="seed of the captions (default 0)")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int | None:
    if isinstance(args.real, Path) and str(args.real) in NAMES and args.protocol is None:
        args.protocol, args.real = str(args.real), True  # `eval --real digits`
    for file in (args.json, args.report):
        if file and (file.is_dir() or not file.parent.is_dir()):
            option = "--json" if file is args.json else "--report"
            raise ValueError(f"{option} {file} cannot be written; name a file in a folder that exists")
    if args.json and args.json == args.report:
        raise ValueError("--json and --report name one file; give two")
    if (args.self_test or args.compare) and (args.protocol or (args.self_test and args.compare)):
        raise ValueError("--self-test and --compare stand alone; leave out the protocol and the other one")
    if args.self_test:
        return _self_test(args)
    if args.compare:
        _compare_files(*args.compare)
    elif args.protocol is None:
        raise ValueError(f"name a protocol: {', '.join(NAMES)}; or give --self-test or --compare")
    elif args.protocol == DIGITS:
        _run_digits(args)
    else:
        _run_protocol(args)
    return None


def _run_digits(args: argparse.Namespace) -> None:
    from cogvideo.files import write_json
    from cogvideo.locks import lock_output
    from cogvideo.logs import get_logger
    from cogvideo.worlds.digits.benchmark import DigitBenchmarkConfig, format_table, run_benchmark

    benchmark = DigitBenchmarkConfig(args.num_prompts, args.captions_seed)
    if args.tokenizer and not args.real:
        raise ValueError("--tokenizer goes with --real; generated clips are decoded by their model's own tokenizer")
    if args.real and (args.overrides or args.config or args.real is not True):
        raise ValueError(
            "digits --real takes no folder and samples nothing, so settings have no effect; leave them out"
        )
    for override in args.overrides:
        if override.partition("=")[0] in FIXED_SETTINGS:
            raise ValueError(f"{override}: the benchmark sets {', '.join(FIXED_SETTINGS)} itself; leave it out")
    for option in ("generated", "prompts", "report", "cache", "seam", "network"):
        if getattr(args, option):
            raise ValueError(f"--{option} has no effect on digits; leave it out")

    tokenizer, generate, about = _real_clips(args) if args.real else _model_clips(args)
    with lock_output(args.json) if args.json else nullcontext():
        results = run_benchmark(benchmark, tokenizer, generate, get_logger("eval").info)
        print(format_table(results))
        if args.json:
            write_json(args.json, {**about, **results.to_json()})


def _run_protocol(args: argparse.Namespace) -> None:
    import tempfile

    from cogvideo.cli._common import device_from
    from cogvideo.evaluation.compare import compare
    from cogvideo.evaluation.comparison_report import format_comparison, write_report
    from cogvideo.evaluation.measure import Meter
    from cogvideo.files import write_json
    from cogvideo.locks import lock_output

    _check_options(args)
    device = device_from(args.device)
    protocol = _protocol(args)
    networks = _open_networks(args, protocol, device)
    protocol = protocol.with_networks({role: network.sha256 for role, network in networks.items()})
    with ExitStack() as stack:
        for file in filter(None, (args.json, args.report)):
            stack.enter_context(lock_output(file))
        # Sets that several seeds share are measured once.
        if args.cache:
            args.cache.mkdir(parents=True, exist_ok=True)
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        generated, tokenizer = _generated(args, protocol, device)
        real = _source(args.real, tokenizer) if args.real else None
        meter = Meter(protocol, networks, args.batch, cache, args.seam)
        result = compare(meter, generated, real, tokenizer, args.seeds)
        print(format_comparison(result))
        sources = {"generated": generated.origin, "generated_kind": generated.kind, "real": str(args.real)}
        used = {role: {"sha256": network.sha256, "trusted": network.trusted} for role, network in networks.items()}
        if args.json:
            about = {"sources": sources, "seeds": args.seeds, "networks": used}
            write_json(args.json, {**about, **result.to_json()})
        if args.report:
            write_report(args.report, result, meter)


def _check_options(args: argparse.Namespace) -> None:
    """Raises: ValueError for options that do not go together."""
    if args.real is True:
        raise ValueError("--real needs the folder of real clips")
    if (args.generated is None) == (args.model is None):
        raise ValueError("give either --generated DIR or --model DIR with --prompts FILE")
    if args.model and not args.prompts:
        raise ValueError("--model needs --prompts FILE, one prompt per line")
    if args.generated and (args.prompts or args.overrides or args.config):
        raise ValueError("--prompts and settings go with --model; --generated clips are there already")
    if args.model and args.tokenizer:
        raise ValueError("--model has its own image tokenizer; leave out --tokenizer")
    if args.protocol != LOCAL:
        given = [name for name in LOCAL_OPTIONS if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} is fixed by {args.protocol}; only {LOCAL} can be changed")
    for name in ("seeds", "batch", "clips", "frames", "stride", "fps", "side"):
        value = getattr(args, name)
        least, most = {"clips": (2, 10**6), "frames": (2, 10_000), "side": (16, 2048)}.get(name, (1, 1000))
        if value is not None and not (0 < value <= most if name == "fps" else least <= value <= most):
            raise ValueError(f"--{name} {value:g}: give {'more than 0' if name == 'fps' else least} to {most}")
    if args.fps is not None and args.stride is not None:
        raise ValueError("--fps and --stride both choose frames; give one of them")


def _protocol(args: argparse.Namespace) -> "Protocol":
    from cogvideo.evaluation import protocols

    if args.protocol != LOCAL:
        return protocols.PROTOCOLS[args.protocol]
    given = {name: value for name in LOCAL_OPTIONS if (value := getattr(args, name)) is not None}
    return replace(protocols.LOCAL, **given)


def _open_networks(
    args: argparse.Namespace, protocol: "Protocol", device: "torch.device"
) -> "dict[str, FeatureNetwork]":
    """Those given, after checking that they are the ones that the protocol needs."""
    from cogvideo.evaluation.networks import KNOWN, open_network, parse_networks

    files = parse_networks(args.network)
    for role in files:
        if role not in protocol.roles:
            raise ValueError(f"--network {role}=: {protocol.name} does not use it; leave it out")
    for role in protocol.roles if protocol.name != LOCAL else ():
        if role not in files:
            known = [f"{entry.name} with SHA-256 {sha256}" for sha256, entry in KNOWN.items() if entry.role == role]
            expected = known[0] if known else "TorchScript, with --trust-network, for no checksum was published"
            raise ValueError(f"{protocol.name} needs --network {role}=FILE: {expected}")
    if args.real is None and protocol.needs_real and not (protocol.name == LOCAL and set(files) <= {"c3d"}):
        raise ValueError(f"{protocol.name} needs --real DIR: {protocol.data}")
    return {role: open_network(role, file, device, trust=args.trust_network) for role, file in files.items()}


def _generated(
    args: argparse.Namespace, protocol: "Protocol", device: "torch.device"
) -> "tuple[ClipSource, ImageTokenizer | None]":
    """The generated clips, and the image tokenizer for the ceiling."""
    from cogvideo.tokenizers.image import open_image_tokenizer

    if args.model:
        return _sampled(args, protocol)
    tokenizer = open_image_tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None:
        tokenizer.model.to(device)
    return _source(args.generated, tokenizer), tokenizer


def _source(folder: Path, tokenizer: "ImageTokenizer | None") -> "ClipSource":
    from cogvideo.evaluation.sources import open_source

    return open_source(folder, tokenizer)


def _sampled(args: argparse.Namespace, protocol: "Protocol") -> "tuple[ClipSource, ImageTokenizer]":
    """Sample as many clips as the protocol needs: one per prompt, or several if there are fewer prompts."""
    import numpy as np

    from cogvideo.evaluation.preprocessing import choose_frames
    from cogvideo.evaluation.sources import clips_of_tokens
    from cogvideo.logs import progress
    from cogvideo.sampling.bundle import load_sample_config
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.text import read_prompts

    prompts = read_prompts(args.prompts)
    config = load_sample_config(args.model, args.config, args.overrides)
    wanted = protocol.clips or len(prompts) * config.samples_per_prompt
    config = replace(config, samples_per_prompt=-(-wanted // len(prompts)))
    pipeline = Pipeline.load(args.model, config)
    count = round(pipeline.fps(config) * config.seconds) + 1
    times = np.linspace(0, config.seconds, count)
    if choose_frames(protocol, count, times, "first", np.random.default_rng()) is None:
        raise ValueError(
            f"the model makes clips of {count} frames, {protocol.name} needs {protocol.frames}; set rounds="
        )
    with progress(pipeline.num_tokens(config, len(prompts)), "sampling", "tokens") as bar:
        tokens = pipeline.sample(prompts, config, bar.update)
    names = [f"{number:05d} {prompts[number // config.samples_per_prompt]}" for number in range(len(tokens))]
    source = clips_of_tokens(tokens, config.seconds, names, pipeline.image_tokenizer, str(args.model))
    return source, pipeline.image_tokenizer


def _self_test(args: argparse.Namespace) -> int:
    from cogvideo.cli._common import device_from
    from cogvideo.evaluation.networks import open_network, parse_networks
    from cogvideo.evaluation.self_test import run_self_test

    device = device_from(args.device)
    files = parse_networks(args.network)
    networks = {role: open_network(role, file, device, trust=args.trust_network) for role, file in files.items()}
    wrong = 0
    for check in run_self_test(networks):
        print(check, flush=True)
        wrong += not check.passed
    print(f"{wrong} wrong" if wrong else "all as expected")
    return 1 if wrong else 0


def _compare_files(left: Path, right: Path) -> None:
    from cogvideo.evaluation.comparison_report import format_files

    print(format_files(left, right))


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
