"""Frames of a video, of saved tokens, or pictures in higher resolution, by CogView2's super-resolution models.

    cogvideo upsample samples/red --direct weights/dsr --iterative weights/itersr --out DIR     what `sample` made
    cogvideo upsample clip.mp4 --caption "a cat runs" --direct weights/dsr --out DIR

The models are converted checkpoints (`cogvideo convert`), or exports of `cogvideo train` with task=superres; without
--direct, those of --model, the bundle that the tokens are of, if it has them. The tokenizers are the bundle's. Given
--direct without --iterative, the direct model's tokens stay as drawn. The results are those of `cogvideo sample`,
and can be stopped and gone on with alike.
"""

import argparse
from pathlib import Path

from cogvideo.cli._sampling import add_making_arguments, make


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="INPUT or key=value", help="what to upsample; a setting")
    parser.add_argument("--direct", metavar="DIR", type=Path, help="the direct model (cogview2-dsr)")
    parser.add_argument("--iterative", metavar="DIR", type=Path, help="the iterative one (cogview2-itersr)")
    parser.add_argument("--caption", metavar="TEXT", help="what the input shows (saved tokens know it)")
    parser.add_argument("--fps", metavar="N", type=float, help="take N frames a second of a video (default: all)")
    add_making_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.cli._common import split_overrides
    from cogvideo.config import load_config
    from cogvideo.distributed import ProcessGroup
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.sampling.checked_jobs import upsample_job
    from cogvideo.sampling.config import UpsampleConfig
    from cogvideo.sampling.inputs import FootageReader
    from cogvideo.sampling.superres import find_models, open_upsampler

    processes = ProcessGroup.from_environment()
    inputs, overrides = split_overrides(args.words)
    if not inputs:
        raise ValueError("there is nothing to upsample; give a video, saved tokens, or pictures")
    config = load_config(UpsampleConfig, args.config, overrides)
    bundle = args.model or BUNDLED_WEIGHTS
    upsampler = open_upsampler(bundle, *find_models(bundle, args.direct, args.iterative), config)
    reader = FootageReader(upsampler.image_tokenizer, upsampler.direct.config.low_res_side)
    footage = reader.open([Path(word) for word in inputs], args.fps)
    make(args, upsample_job(upsampler, footage, args.caption), args.out, processes)
