"""Add frames between the frames of a video, of saved tokens, or of a sequence of pictures, using stage 2 alone.

    cogvideo interpolate samples/red --out DIR rounds=1                     results of `cogvideo sample`, or tokens
    cogvideo interpolate clip.mp4 --caption "a cat runs" --out DIR          all frames of a video; --fps 2: 2 per second
    cogvideo interpolate a.png b.png c.png --caption "a cat runs" --out DIR seconds=2 rounds=2

Each of the `rounds` adds a frame between every two neighbours. Pictures are spaced evenly over `seconds`; videos and
saved tokens keep their timing. Pictures are scaled and cropped to the centre square, as in `cogvideo prepare`. Output
and resuming work as in `cogvideo sample`.
"""

import argparse

from cogvideo.cli._sampling import (
    ACTS_ON,
    add_input_arguments,
    add_run_arguments,
    refuse_inputs_among_results,
    refuse_unused_settings,
    run_job,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="INPUT or key=value", help="what to interpolate; a setting")
    add_input_arguments(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.config import expand_path, split_overrides
    from cogvideo.distributed import ProcessGroup
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.sampling.bundle import load_sample_config
    from cogvideo.sampling.inputs import InputReader
    from cogvideo.sampling.jobs import interpolation_job
    from cogvideo.sampling.pipeline import Pipeline

    processes = ProcessGroup.from_environment()
    inputs, overrides = split_overrides(args.words)
    if not inputs:
        raise ValueError("there is nothing to interpolate; give a video, saved tokens, or pictures")
    refuse_unused_settings(overrides, ACTS_ON)
    directory = args.model or BUNDLED_WEIGHTS
    config = load_sample_config(directory, args.config, overrides)
    pipeline = Pipeline.load(directory, config)
    reader = InputReader(pipeline.image_tokenizer, pipeline.sequential.config.frame_side)
    paths = [expand_path(word) for word in inputs]
    refuse_inputs_among_results(paths, args.out)
    given = reader.read(paths, args.fps)
    if given.seconds is not None and any(word.startswith("seconds=") for word in overrides):
        raise ValueError(f"seconds= is for pictures; this input has its own length, {given.seconds:g} seconds")
    run_job(args, interpolation_job(pipeline, config, given, args.caption), args.out, processes)
