"""Frames between the frames of a video, of saved tokens, or of pictures in a row: stage 2 alone.

    cogvideo interpolate samples/red --out DIR rounds=1                     what `cogvideo sample` made, or its tokens
    cogvideo interpolate clip.mp4 --caption "a cat runs" --out DIR          all its frames; --fps 2: two a second
    cogvideo interpolate a.png b.png c.png --caption "a cat runs" --out DIR seconds=2 rounds=2

Each round of `rounds` puts a frame between every two. Pictures are spread evenly over `seconds`; a video and saved
tokens keep their own time. Pictures are scaled and cut to the centre square, as `cogvideo prepare` does. The results
are those of `cogvideo sample`, and can be stopped and gone on with alike.
"""

import argparse
from pathlib import Path

from cogvideo.cli._sampling import add_making_arguments, make


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="INPUT or key=value", help="what to interpolate; a setting")
    parser.add_argument("--caption", metavar="TEXT", help="what the input shows (saved tokens know it)")
    parser.add_argument("--fps", metavar="N", type=float, help="take N frames a second of a video (default: all)")
    add_making_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.cli._common import split_overrides
    from cogvideo.distributed import ProcessGroup
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.sampling.bundle import bundle_sample_config
    from cogvideo.sampling.checked_jobs import interpolation_job
    from cogvideo.sampling.inputs import FootageReader
    from cogvideo.sampling.pipeline import Pipeline

    processes = ProcessGroup.from_environment()
    inputs, overrides = split_overrides(args.words)
    if not inputs:
        raise ValueError("there is nothing to interpolate; give a video, saved tokens, or pictures")
    directory = args.model or BUNDLED_WEIGHTS
    config = bundle_sample_config(directory, args.config, overrides)
    pipeline = Pipeline.load(directory, config)
    reader = FootageReader(pipeline.image_tokenizer, pipeline.sequential.config.frame_side)
    footage = reader.open([Path(word) for word in inputs], args.fps)
    if footage.seconds is not None and any(word.startswith("seconds=") for word in overrides):
        raise ValueError(f"seconds= is for pictures; this input lasts {footage.seconds:g} seconds by itself")
    make(args, interpolation_job(pipeline, config, footage, args.caption), args.out, processes)
