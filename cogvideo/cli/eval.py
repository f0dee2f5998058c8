"""Evaluate clips: a model's against real ones by a named protocol, or on a benchmark of a synthetic world.

    cogvideo eval PROTOCOL --real DIR --generated DIR [--network i3d=FILE] [--tokenizer DIR] [--seeds N] [--json FILE]
    cogvideo eval PROTOCOL --real DIR --tokenizer DIR [--network i3d=FILE]    reconstructed clips in place of generated
    cogvideo eval PROTOCOL --real DIR --model DIR --prompts FILE [--network i3d=FILE] [key=value ...]
    torchrun --nproc-per-node 2 -m cogvideo eval PROTOCOL --cache DIR ...     in several processes
    cogvideo eval digits [--model DIR] [--cache DIR] [--json FILE] [key=value ...]    clips of 200 test captions
    cogvideo eval bodies --model DIR [--split unseen] [--continued] [--cache DIR] [--report FILE] [key=value ...]
    cogvideo eval digits|bodies --real [--tokenizer DIR]                 real clips and their reconstructions only
    cogvideo eval --self-test [--network i3d=FILE]                       known values of all measures
    cogvideo eval --compare A.json B.json                                two results of a protocol side by side

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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import add_config_arguments, weights
from cogvideo.hub import describe

if TYPE_CHECKING:
    import torch

    from cogvideo.distributed import ProcessGroup
    from cogvideo.evaluation.compare import Comparison
    from cogvideo.evaluation.lpips import PairNetwork
    from cogvideo.evaluation.measure import Meter
    from cogvideo.evaluation.networks import FeatureNetwork
    from cogvideo.evaluation.protocols import Protocol
    from cogvideo.evaluation.sources import ClipSource
    from cogvideo.sampling.config import SampleConfig
    from cogvideo.tokenizers.image import ImageTokenizer
    from cogvideo.worlds.benchmark import Benchmark, Generate

# With other values, the clips would not match what the captions ask for.
FIXED_SETTINGS = ("seconds", "rounds", "samples_per_prompt")
DIGITS, BODIES, LOCAL = "digits", "bodies", "local"
NAMES = (
    *("tats-2048x16-128", "styleganv-2048x16", "ucf101-2048", "ucf101-10000", "kinetics600-5to11-64"),
    *("msrvtt-2990", "msrvtt-59794"),
    *(LOCAL, DIGITS, BODIES),
)
LOCAL_OPTIONS = ("clips", "frames", "stride", "fps", "side", "crop")
"""Options that set a field of the local protocol."""
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
        "--captions", metavar="FILE", type=Path, help="captions of videos by file name, for CLIPSIM (.csv, .jsonl ...)"
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
        "--compare", metavar="FILE", nargs=2, type=Path, help="two files that --json wrote for protocols"
    )
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
    if args.protocol in (None, *OPTIONS_OF) and ProcessGroup.from_environment().size > 1:
        raise ValueError("only protocols with --cache run in several processes; start this without a launcher")
    if args.self_test:
        return _self_test(args)
    if args.compare:
        _compare_files(*args.compare)
    elif args.protocol in OPTIONS_OF:
        _run_world(args)
    else:
        _run_protocol(args)
    return None


def _refuse_unused(args: argparse.Namespace) -> None:
    """Set defaults. Raises: ValueError for an option that would have no effect."""
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
    if args.batch is not None and mode in OPTIONS_OF and not _wants_distances(args):
        raise ValueError("--batch is for the networks of --distances, and none are used; leave it out")
    if args.trust_network and not args.network:
        raise ValueError("--trust-network goes with --network; leave it out")
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _run_world(args: argparse.Namespace) -> None:
    from cogvideo.cli._common import device_from
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
    networks = _packaged_networks(args, device)
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


def _run_protocol(args: argparse.Namespace) -> None:
    import tempfile

    from cogvideo.cli._common import device_from
    from cogvideo.distributed import ProcessGroup
    from cogvideo.evaluation.compare import compare
    from cogvideo.evaluation.likelihood import read_scores
    from cogvideo.evaluation.measure import Meter
    from cogvideo.evaluation.networks import FeatureNetwork
    from cogvideo.locks import lock_output

    _check_options(args)
    processes = ProcessGroup.from_environment()
    if processes.size > 1 and not args.cache:
        raise ValueError("several processes need --cache DIR, a folder that all of them see")
    protocol = _protocol(args)
    if args.seam is not None and args.seam >= protocol.frames:
        raise ValueError(
            f"a seam at frame {args.seam} needs longer clips; {protocol.name} has {protocol.frames} frames"
        )
    scores = read_scores(args.scores) if args.scores else None
    device = device_from(args.device)
    given = _open_networks(args, protocol, device)
    protocol = protocol.with_networks({role: network.sha256 for role, network in given.items()})
    networks = {role: network for role, network in given.items() if isinstance(network, FeatureNetwork)}
    pairs = {role: network for role, network in given.items() if not isinstance(network, FeatureNetwork)}
    networks |= _packaged_networks(args, device) if args.real else {}
    with ExitStack() as stack:
        for file in filter(None, (args.json, args.report)) if processes.rank == 0 else ():
            stack.enter_context(lock_output(file))
        # Clip sets that several seeds share are measured once.
        if args.cache:
            args.cache.mkdir(parents=True, exist_ok=True)
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        generated, real, tokenizer = _clips(args, protocol, device, cache, processes)
        meter = Meter(protocol, networks, args.batch, cache, args.seam, processes, pairs)
        result = compare(meter, generated, real, tokenizer, args.seeds, scores)
        if processes.rank == 0:
            _write_results(args, result, meter, generated)
    processes.close()


def _write_results(
    args: argparse.Namespace, result: "Comparison", meter: "Meter", generated: "ClipSource | None"
) -> None:
    from cogvideo.evaluation.comparison_report import format_comparison, write_report
    from cogvideo.evaluation.packaged_networks import INSTALL, are_installed
    from cogvideo.files import write_json

    if args.real and args.distances is None and not are_installed():
        result.notes.append(f"appearance and motion distance need their networks: {INSTALL}")
    print(format_comparison(result))
    given = args.model or args.generated
    origin = describe(given) if given else f"{args.real} reconstructed by {describe(args.tokenizer)}"
    kind = "reconstructed" if generated is None else generated.kind
    sources = {"generated": origin, "generated_kind": kind, "real": str(args.real)}
    networks = meter.networks | meter.pair_networks
    used = {role: {"sha256": network.sha256, "trusted": network.trusted} for role, network in networks.items()}
    if args.json:
        about = {"sources": sources, "seeds": args.seeds, "networks": used}
        write_json(args.json, {**about, **result.to_json()})
    if args.report:
        write_report(args.report, result, meter)


def _packaged_networks(args: argparse.Namespace, device: "torch.device") -> "dict[str, FeatureNetwork]":
    """The networks of `--distances`, by role; none if not wanted, or if neither installed nor asked for."""
    from cogvideo.evaluation.packaged_networks import open_packaged

    return open_packaged(device) if _wants_distances(args) else {}


def _wants_distances(args: argparse.Namespace) -> bool:
    from cogvideo.evaluation.packaged_networks import are_installed

    return are_installed() if args.distances is None else bool(args.distances)


def _check_options(args: argparse.Namespace) -> None:
    """Raises: ValueError for options that do not go together."""
    if args.real is True:
        raise ValueError("--real needs the folder of real clips")
    if (args.generated is None) == (args.model is None) and (args.generated or not (args.real and args.tokenizer)):
        raise ValueError(
            "give either --generated DIR or --model DIR with --prompts FILE; or --real DIR and --tokenizer DIR alone, "
            "to measure reconstructed clips"
        )
    if args.model and not args.prompts:
        raise ValueError("--model needs --prompts FILE, one prompt per line")
    if not args.model and (args.prompts or args.overrides or args.config):
        raise ValueError("--prompts and settings go with --model; --generated clips exist already")
    if args.captions and not (any(word.startswith("clip=") for word in args.network) and (args.generated or args.real)):
        raise ValueError(
            "--captions gives the captions of videos, for CLIPSIM; give --network clip=FILE, and --generated or --real"
        )
    if args.distances and not args.real:
        raise ValueError("--distances compares with real clips; give --real DIR")
    if args.model and args.tokenizer:
        raise ValueError("--model has its own image tokenizer; leave out --tokenizer")
    if args.protocol != LOCAL:
        given = [name for name in LOCAL_OPTIONS if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} is fixed by {args.protocol}; only {LOCAL} can be changed")
    for name in ("seeds", "clips", "frames", "stride", "fps", "side"):
        value = getattr(args, name)
        least, most = {"clips": (2, 10**6), "frames": (2, 10_000), "side": (16, 2048)}.get(name, (1, 1000))
        if value is not None and not (0 < value <= most if name == "fps" else least <= value <= most):
            raise ValueError(f"--{name} {value:g}: give {'more than 0' if name == 'fps' else least} to {most}")
    if args.seam is not None and args.seam < 1:
        raise ValueError(f"--seam {args.seam}: give the frame that the continued clip begins with, 1 or more")
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
) -> "dict[str, FeatureNetwork | PairNetwork]":
    """Open the given networks, after checking that they are the ones that the protocol needs."""
    from cogvideo.evaluation.lpips import LPIPS_ROLES
    from cogvideo.evaluation.networks import KNOWN, parse_networks

    files = parse_networks(args.network)
    for role in files:
        if role in LPIPS_ROLES:
            if not (args.model or args.tokenizer) or args.real is None:
                raise ValueError(
                    f"--network {role}=: LPIPS is for reconstructed clips; give --real and --tokenizer too"
                )
        elif role not in protocol.roles:
            raise ValueError(f"--network {role}=: {protocol.name} does not use it; leave it out")
    for role in protocol.roles if protocol.name != LOCAL else ():
        if role not in files:
            known = [f"{entry.name} with SHA-256 {sha256}" for sha256, entry in KNOWN.items() if entry.role == role]
            expected = known[0] if known else "TorchScript, with --trust-network, since no checksum was published"
            raise ValueError(f"{protocol.name} needs --network {role}=FILE: {expected}")
    if args.real is None and protocol.needs_real and not (protocol.name == LOCAL and set(files) <= {"c3d", "clip"}):
        raise ValueError(f"{protocol.name} needs --real DIR: {protocol.data}")
    return _open_files(files, device, args.trust_network)


def _open_files(
    files: dict[str, Path], device: "torch.device", trust: bool
) -> "dict[str, FeatureNetwork | PairNetwork]":
    from cogvideo.evaluation.lpips import LPIPS_ROLES, PairNetwork, open_pair_network
    from cogvideo.evaluation.networks import WEIGHTS_ROLES, FeatureNetwork, open_network
    from cogvideo.evaluation.weight_files import open_weights

    networks: dict[str, FeatureNetwork | PairNetwork] = {}
    for role, file in files.items():
        if role in LPIPS_ROLES:
            networks[role] = open_pair_network(role, file, device, trust=trust)
        else:
            opener = open_weights if role in WEIGHTS_ROLES else open_network
            networks[role] = opener(role, file, device, trust=trust)
    return networks


def _clips(
    args: argparse.Namespace, protocol: "Protocol", device: "torch.device", cache: Path, processes: "ProcessGroup"
) -> "tuple[ClipSource | None, ClipSource | None, ImageTokenizer | None]":
    """The generated clips, the real ones, and the image tokenizer for the ceiling; inputs are checked first."""
    from cogvideo.evaluation.compare import check_tokenizer
    from cogvideo.evaluation.generation import sample_clips
    from cogvideo.evaluation.sources import open_source, with_captions
    from cogvideo.sampling.bundle import fingerprint
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.text import read_prompts
    from cogvideo.tokenizers.image import open_image_tokenizer

    if args.model:
        prompts, config = read_prompts(args.prompts), _sample_config(args)
        pipeline = Pipeline.load(args.model, config)
        check_tokenizer(protocol, pipeline.image_tokenizer)
        real = open_source(args.real, pipeline.image_tokenizer) if args.real else None
        if real is not None and args.captions:
            real = with_captions(real, args.captions)  # generated clips have their prompts as captions
        generated = sample_clips(
            pipeline,
            config,
            prompts,
            protocol,
            real,
            weights=fingerprint(args.model),
            cache=cache,
            processes=processes,
        )
        return generated, real, pipeline.image_tokenizer
    tokenizer = open_image_tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None:
        check_tokenizer(protocol, tokenizer)
        tokenizer.model.to(device)
    sources = [open_source(folder, tokenizer) if folder else None for folder in (args.generated, args.real)]
    if args.captions:
        sources = [source and with_captions(source, args.captions) for source in sources]
    return sources[0], sources[1], tokenizer


def _sample_config(args: argparse.Namespace) -> "SampleConfig":
    """The sampling settings; device= takes precedence over `--device`."""
    from cogvideo.sampling.bundle import load_sample_config

    overrides = [*([f"device={args.device}"] if args.device else []), *args.overrides]
    return load_sample_config(_bundle(args), args.config, overrides)


def _self_test(args: argparse.Namespace) -> int:
    from cogvideo.cli._common import device_from
    from cogvideo.evaluation.networks import parse_networks
    from cogvideo.evaluation.self_test import run_self_test

    device = device_from(args.device)
    networks = _open_files(parse_networks(args.network), device, args.trust_network)
    wrong = 0
    for check in run_self_test(networks):
        print(check, flush=True)
        wrong += not check.passed
    print(f"{wrong} wrong" if wrong else "all as expected")
    return 1 if wrong else 0


def _compare_files(left: Path, right: Path) -> None:
    from cogvideo.evaluation.comparison_report import format_files

    print(format_files(left, right))


def _real_clips(args: argparse.Namespace, device: "torch.device") -> "tuple[ImageTokenizer, None, dict[str, Any]]":
    from cogvideo.tokenizers.image import open_image_tokenizer

    tokenizer = open_image_tokenizer(args.tokenizer or _bundle(args) / "image_tokenizer")
    tokenizer.model.to(device)
    return tokenizer, None, {"tokenizer": describe(args.tokenizer or args.model or "bundled")}


def _model_clips(args: argparse.Namespace, benchmark: "Benchmark") -> "tuple[ImageTokenizer, Generate, dict[str, Any]]":
    from cogvideo.config import to_dict
    from cogvideo.sampling.bundle import fingerprint
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.worlds.benchmark import generate_with

    config = _sample_config(args)
    pipeline = Pipeline.load(_bundle(args), config)
    if args.cache:
        args.cache.mkdir(parents=True, exist_ok=True)
    generate = generate_with(
        pipeline, config, benchmark.side, weights=fingerprint(_bundle(args)) if args.cache else "", cache=args.cache
    )
    about = {"model": describe(args.model or "bundled"), "sampling": to_dict(config)}
    return pipeline.image_tokenizer, generate, about


def _bundle(args: argparse.Namespace) -> Path:
    from cogvideo.files import BUNDLED_WEIGHTS

    return args.model or BUNDLED_WEIGHTS
