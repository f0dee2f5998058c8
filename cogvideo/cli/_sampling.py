"""What `sample`, `interpolate`, `upsample` and the interactive mode share: arguments, inputs, and running a job."""

import argparse
import os
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import add_config_argument, weights

if TYPE_CHECKING:
    from cogvideo.distributed import ProcessGroup
    from cogvideo.sampling.config import SampleConfig, UpsampleConfig
    from cogvideo.sampling.inputs import InputClips
    from cogvideo.sampling.jobs import Job
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.sampling.runner import RunDirectory
    from cogvideo.sampling.superres import Upsampler


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="output folder, new or empty")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="write into a folder that already holds files")
    existing.add_argument("--resume", action="store_true", help="continue an interrupted run in --out, if there is one")
    parser.add_argument(
        "--model", metavar="DIR", type=weights, help="a bundle of weights (default: the bundled weights)"
    )
    add_config_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        metavar="DIR[:SCALE]",
        action="append",
        default=[],
        help="an adapter, merged when loaded; may be repeated",
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of commands that read clips."""
    parser.add_argument("--caption", metavar="TEXT", help="what the input shows (saved tokens have captions)")
    parser.add_argument("--fps", metavar="N", type=float, help="read N frames per second of a video (default: all)")


def load_configs(args: argparse.Namespace, overrides: list[str]) -> "tuple[SampleConfig, UpsampleConfig | None]":
    """Settings of the clips, and with --upsample those of super-resolution. Raises: as `load_config`."""
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.sampling.bundle import load_sample_config

    directory = args.model or BUNDLED_WEIGHTS
    if args.upsample:
        from cogvideo.sampling.superres import load_both_configs

        return load_both_configs(directory, args.config, overrides)
    return load_sample_config(directory, args.config, overrides), None


def refuse_rounds_without_model(overrides: Sequence[str], prefix: str = "") -> None:
    """Raises: ValueError for a setting of the iterative model's rounds, on a command line that uses no such model."""
    for word in overrides:
        if word.startswith(f"{prefix}round_top_k=") and word != f"{prefix}round_top_k=[]":
            raise ValueError(f"{word} is for the iterative model, and none is used; give one, or leave it out")


ACTS_ON = {
    "given_frames": "`cogvideo sample --continue`",
    "first_frame": "first frames that are drawn",
    "style": "first frames that are drawn",
    "key_frames": "`cogvideo sample`",
    "samples_per_prompt": "prompts",
}
"""What a setting, or a group of settings, affects, if that is not every command that accepts it."""


def refuse_unused_settings(overrides: Sequence[str], unused: Collection[str]) -> None:
    """Raises: ValueError for a setting of the command line that is one of `unused`, keys of ACTS_ON."""
    for word in overrides:
        name = re.split(r"[.=]", word, maxsplit=1)[0]
        if name in unused:
            raise ValueError(f"{word} has an effect on {ACTS_ON[name]} only; leave it out")


def unused_when_sampling(args: argparse.Namespace, *, has_prompts: bool) -> set[str]:
    """Settings that have no effect on `cogvideo sample` with these arguments."""
    unused = set() if args.continue_from is not None else {"given_frames"}
    if args.continue_from is not None or args.first_frame is not None:
        unused |= {"first_frame", "style"}
        if not has_prompts:
            unused.add("samples_per_prompt")  # saved clips come with captions and sample indices
    return unused


def refuse_inputs_among_results(inputs: Sequence[Path], out: Path) -> None:
    """Raises: ValueError for an input that the results in `out` would replace."""
    from cogvideo.sampling.outputs import LARGE, RESULT_NAME

    places = [out.resolve(), out.resolve() / LARGE]
    for path in inputs:
        named = path.parent.resolve() / path.name  # a link in `out` would be replaced, whatever it points to
        files = {path.resolve(), named}
        if any(file in places or (file.parent in places and RESULT_NAME.fullmatch(file.name)) for file in files):
            raise ValueError(f"{path} would be replaced by the results in --out {out}; choose another --out")


def read_given_clips(args: argparse.Namespace, pipeline: "Pipeline", config: "SampleConfig") -> "InputClips | None":
    """Read what --first-frame or --continue names. Raises: ValueError, OSError."""
    from cogvideo.sampling.inputs import InputReader

    if not args.interactive:  # interactive results go to folders of their own
        given = (args.first_frame, args.continue_from)
        refuse_inputs_among_results([path for path in given if path is not None], args.out)
    reader = InputReader(pipeline.image_tokenizer, pipeline.sequential.config.frame_side)
    if args.first_frame is not None:
        return reader.read_first_frame(args.first_frame)
    if args.continue_from is not None:
        return reader.read_to_continue(args.continue_from, pipeline.fps(config))
    return None


def run_job(
    args: argparse.Namespace,
    job: "Job",
    out: Path,
    processes: "ProcessGroup",
    stop: threading.Event | None = None,
    upsampler: "Upsampler | None" = None,
) -> None:
    """Generate a job's clips into `out`, as the arguments say; `args.adapter`, if present, holds AdapterChoices.

    `upsampler` then makes large versions of them, in the subfolder LARGE. `stop` is for worker threads, which signals
    do not reach: once it is set, the run ends as after a signal.
    Raises: ValueError, OSError before anything is written.
    """
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.hub import describe
    from cogvideo.locks import lock_folder
    from cogvideo.sampling.adapters import AdapterChoice
    from cogvideo.sampling.bundle import fingerprint
    from cogvideo.sampling.jobs import describe_job
    from cogvideo.sampling.outputs import LARGE
    from cogvideo.sampling.runner import RunDirectory

    plan = describe_job(job)
    if args.dry_run:
        if processes.rank == 0:
            tokens = f"{len(job.keys) * job.tokens_per_clip} tokens to draw"
            if upsampler is not None:
                tokens += f", then {len(job.keys) * job.num_frames * upsampler.tokens_per_frame} of large frames"
            print(f"{plan}: {tokens}; nothing was written")
        return
    directory = args.model or BUNDLED_WEIGHTS
    identity: dict[str, Any] = {"weights": fingerprint(directory), **job.identity()}
    adapters: list[AdapterChoice] = getattr(args, "adapter", [])
    if adapters:
        apart = getattr(args, "adapters_apart", False)
        identity["adapters"] = [choice.identity() | {"apart": apart} for choice in adapters]
    run = RunDirectory(out, identity, processes)
    with lock_folder(out, processes):
        stale = processes.broadcast_from_rank_0(lambda: _check_large_folder(out, args.resume, upsampler is not None))
        begun = run.begin(overwrite=args.overwrite, resume=args.resume)
        if begun:
            if stale and processes.rank == 0:
                os.rename(out / LARGE, run.folder / LARGE)  # made from other clips; removed when this run ends
            _write_clips(job, run, " + ".join([describe(directory), *map(str, adapters)]), stop, args.overwrite)
        if processes.rank == 0:
            print(f"{plan}: {out}" if begun else f"{plan}: {out} is already finished", flush=True)
        if upsampler is not None:
            processes.barrier()
            _upsample(args, upsampler, out, processes, stop)
    processes.close()


def _check_large_folder(out: Path, resume: bool, upsample: bool) -> bool:
    """Whether `out` has large clips that were made from clips other than those to be generated there.

    Raises: FileExistsError if their folder holds anything but results, and large clips would be removed from it or,
    with `upsample`, written to it.
    """
    from cogvideo.files import is_temporary
    from cogvideo.locks import entries
    from cogvideo.sampling.outputs import LARGE, RESULT_NAME
    from cogvideo.sampling.runner import RESULT, UNFINISHED

    folder = out / LARGE
    if resume and (out / RESULT).is_file() and not (out / UNFINISHED).exists():
        return False  # they were made from these clips, and stay
    runs = [place for place in (out, folder) if (place / RESULT).is_file() or (place / UNFINISHED).is_dir()]
    if len(runs) < 2 and not upsample:
        return False  # there are none, or they were not made from the clips in `out`
    if not folder.is_dir():
        others = [folder.name] if folder.exists() else []
    else:
        names = [path.name for path in entries(folder) if not is_temporary(path)]
        others = [name for name in names if name != UNFINISHED and RESULT_NAME.fullmatch(name) is None]
    if others:
        reason = "--upsample writes into" if upsample else "large clips of an earlier run would be removed from"
        raise FileExistsError(f"{reason} {folder}, which holds other files ({others[0][:80]}); choose another --out")
    return folder.exists()


def _upsample(
    args: argparse.Namespace,
    upsampler: "Upsampler",
    out: Path,
    processes: "ProcessGroup",
    stop: threading.Event | None,
) -> None:
    """Upsample the finished clips in `out`, or resume doing so, as `cogvideo upsample` does."""
    from cogvideo.sampling.inputs import InputReader
    from cogvideo.sampling.jobs import upsample_job
    from cogvideo.sampling.outputs import LARGE

    reader = InputReader(upsampler.image_tokenizer, upsampler.direct.config.low_res_side)
    job = upsample_job(upsampler, reader.read([out]), None)
    # if the folder exists at this point, an earlier run of this command started it
    again = argparse.Namespace(**{**vars(args), "adapter": [], "overwrite": False, "resume": True})
    run_job(again, job, out / LARGE, processes, stop)


def _write_clips(job: "Job", run: "RunDirectory", weights: str, stop: threading.Event | None, overwrite: bool) -> None:
    from cogvideo.logs import get_logger, progress
    from cogvideo.sampling.runner import clip_groups, write_clips

    own_clips = sum(map(len, clip_groups(job, run.processes)))
    name = "sampling" if stop is None else run.out.name
    interruption = resume_hint(run.out, overwrite) if stop is None else nullcontext()
    with interruption, progress(own_clips * job.tokens_per_clip, name, "tokens") as bar:

        def count_tokens(drawn: int) -> None:
            if stop is not None and stop.is_set():
                raise SystemExit(1)
            bar.update(drawn)

        for path, final in write_clips(job, run, weights=weights, progress=count_tokens):
            if final:
                get_logger().info(str(path))


@contextmanager
def resume_hint(out: Path, overwrite: bool) -> Iterator[None]:
    """After a signal, log how to resume a command that was given --overwrite or not."""
    from cogvideo.logs import get_logger

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        option = "--resume instead of --overwrite" if overwrite else "--resume"
        get_logger().info(f"{out}: finished work is kept; run the same command with {option} to continue")
        raise
