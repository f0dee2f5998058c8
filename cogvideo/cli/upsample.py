"""Increase the resolution of a video, of saved tokens, or of pictures with CogView2's super-resolution models.

    cogvideo upsample samples/red --out DIR                                        results of `sample`
    cogvideo upsample clip.mp4 --caption "a cat runs" --model DIR --out DIR
    cogvideo upsample samples/lion --model DIR --direct models/dsr --iterative models/itersr --out DIR

The models are converted checkpoints (`cogvideo convert`) or exports of `cogvideo train` with task=superres; without
--direct, those in the bundle at --model. The tokenizers always come from that bundle, so saved tokens must have been
made with it. With --direct but no --iterative, the direct model's tokens are final. --adapter DIR[:SCALE] merges an
adapter into the weights of the model that it belongs to. Output and resuming work as in `cogvideo sample`.
"""

import argparse

from cogvideo.cli._common import weights
from cogvideo.cli._sampling import (
    add_adapter_argument,
    add_input_arguments,
    add_run_arguments,
    refuse_inputs_among_results,
    refuse_rounds_without_model,
    run_job,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="INPUT or key=value", help="what to upsample; a setting")
    parser.add_argument("--direct", metavar="DIR", type=weights, help="the direct model (cogview2-dsr)")
    parser.add_argument("--iterative", metavar="DIR", type=weights, help="the iterative model (cogview2-itersr)")
    add_adapter_argument(parser)
    add_input_arguments(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.config import expand_path, split_overrides
    from cogvideo.distributed import ProcessGroup
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.sampling.adapters import AdapterChoice
    from cogvideo.sampling.bundle import load_upsample_config
    from cogvideo.sampling.inputs import InputReader
    from cogvideo.sampling.jobs import upsample_job
    from cogvideo.sampling.superres import find_models, open_upsampler

    processes = ProcessGroup.from_environment()
    inputs, overrides = split_overrides(args.words)
    if not inputs:
        raise ValueError("there is nothing to upsample; give a video, saved tokens, or pictures")
    bundle = args.model or BUNDLED_WEIGHTS
    own = args.direct is None and args.iterative is None
    config = load_upsample_config(bundle if own else None, args.config, overrides)
    if args.iterative is not None and not config.round_top_k:
        raise ValueError(f"round_top_k=[] disables --iterative {args.iterative}; leave out one of the two")
    adapters = args.adapter = [AdapterChoice.parse(text) for text in args.adapter]
    direct, iterative = find_models(bundle, args.direct, args.iterative)
    if iterative is None:
        refuse_rounds_without_model(overrides)
    upsampler = open_upsampler(bundle, direct, iterative, config, adapters)
    reader = InputReader(upsampler.image_tokenizer, upsampler.direct.config.low_res_side)
    paths = [expand_path(word) for word in inputs]
    refuse_inputs_among_results(paths, args.out)
    given = reader.read(paths, args.fps)
    run_job(args, upsample_job(upsampler, given, args.caption), args.out, processes)
