"""What `cogvideo eval` does for a protocol: checks options, opens networks and clips, measures, writes results."""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideo.hub import describe

if TYPE_CHECKING:
    import torch

    from cogvideo.data.captions import CaptionsFile
    from cogvideo.distributed import ProcessGroup
    from cogvideo.evaluation.compare import Comparison
    from cogvideo.evaluation.lpips import PairNetwork
    from cogvideo.evaluation.measure import Meter
    from cogvideo.evaluation.networks import FeatureNetwork
    from cogvideo.evaluation.protocols import Protocol
    from cogvideo.evaluation.sources import ClipSource
    from cogvideo.sampling.config import SampleConfig
    from cogvideo.tokenizers.image import ImageTokenizer

LOCAL = "local"
"""The protocol that takes any clips."""
LOCAL_OPTIONS = ("clips", "frames", "stride", "fps", "side", "crop")
"""Options that set a field of the local protocol."""

CAPTIONS_OPTIONS = ("video_column", "caption_column", "start_column", "end_column", "encoding")
"""Options that go with `--captions`."""


def run_protocol(args: argparse.Namespace) -> None:
    """Measure clips by `args.protocol`, in one process or several, and print and write the results.

    Raises: ValueError, OSError.
    """
    import tempfile

    from cogvideo.cli._common import device_from
    from cogvideo.distributed import ProcessGroup
    from cogvideo.evaluation.compare import compare
    from cogvideo.evaluation.likelihood import read_scores
    from cogvideo.evaluation.measure import Meter
    from cogvideo.evaluation.networks import FeatureNetwork
    from cogvideo.evaluation.packaged_networks import open_wanted
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
    networks |= open_wanted(args.distances, device) if args.real else {}
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
    for name in CAPTIONS_OPTIONS:
        if getattr(args, name) is not None and not args.captions:
            raise ValueError(
                f"--{name.replace('_', '-')} says how --captions is read; give --captions, or leave it out"
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
    return open_files(files, device, args.trust_network)


def open_files(
    files: dict[str, Path], device: "torch.device", trust: bool
) -> "dict[str, FeatureNetwork | PairNetwork]":
    """Open the network of each role. `trust`: load unknown files too. Raises: ValueError, OSError."""
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
        prompts, config = read_prompts(args.prompts), sample_config(args)
        pipeline = Pipeline.load(args.model, config)
        check_tokenizer(protocol, pipeline.image_tokenizer)
        real = open_source(args.real, pipeline.image_tokenizer) if args.real else None
        if real is not None and args.captions:
            (real,) = with_captions([real], _captions(args))  # generated clips have their prompts as captions
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
    sources = [open_source(folder, tokenizer) for folder in (args.generated, args.real) if folder]
    if args.captions:
        sources = with_captions(sources, _captions(args))
    return sources[0] if args.generated else None, sources[-1] if args.real else None, tokenizer


def _captions(args: argparse.Namespace) -> "CaptionsFile":
    """Open the captions, and warn about records that are skipped."""
    from cogvideo.cli._common import read_options_from
    from cogvideo.data.readers import open_captions
    from cogvideo.logs import get_logger

    found = open_captions(args.captions, read_options_from(args), skip_bad=True)
    for reason in islice(found.bad_reasons(), 10):
        get_logger("eval").warning("skipped %s", reason)
    return found


def sample_config(args: argparse.Namespace) -> "SampleConfig":
    """The sampling settings; device= takes precedence over `--device`."""
    from cogvideo.sampling.bundle import load_sample_config

    overrides = [*([f"device={args.device}"] if args.device else []), *args.overrides]
    return load_sample_config(bundle_of(args), args.config, overrides)


def bundle_of(args: argparse.Namespace) -> Path:
    """The folder of weights that `--model` names; by default the bundled weights."""
    from cogvideo.files import BUNDLED_WEIGHTS

    return args.model or BUNDLED_WEIGHTS
