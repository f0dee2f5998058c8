"""Frames of a video, of saved tokens, or pictures in higher resolution, by CogView2's super-resolution models.

    cogvideo upsample samples/red --direct weights/dsr --iterative weights/itersr --out DIR     what `sample` made
    cogvideo upsample clip.mp4 --caption "a cat runs" --direct weights/dsr --out DIR

The models are converted checkpoints (`cogvideo convert`); the tokenizers are those of --model, the bundle that the
tokens are of. Without --iterative the direct model's tokens stay as drawn. The results are those of `cogvideo sample`,
and can be stopped and gone on with alike.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideo.cli.making import add_making_arguments, make

if TYPE_CHECKING:
    from cogvideo.sampling.config import UpsampleConfig
    from cogvideo.sampling.upsample import Upsampler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="INPUT or key=value", help="what to upsample; a setting")
    parser.add_argument("--direct", metavar="DIR", type=Path, required=True, help="the direct model (cogview2-dsr)")
    parser.add_argument("--iterative", metavar="DIR", type=Path, help="the iterative one (cogview2-itersr)")
    parser.add_argument("--caption", metavar="TEXT", help="what the input shows (saved tokens know it)")
    parser.add_argument("--fps", metavar="N", type=float, help="take N frames a second of a video (default: all)")
    add_making_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.cli.common import split_overrides
    from cogvideo.config import load_config
    from cogvideo.sampling.bundle import DEFAULT_DIRECTORY
    from cogvideo.sampling.config import UpsampleConfig
    from cogvideo.sampling.footage import FootageReader
    from cogvideo.sampling.jobs import UpsampleJob
    from cogvideo.sampling.processes import Processes
    from cogvideo.sampling.uniforms import SampleKey, sample_keys

    processes = Processes.from_environment()
    inputs, overrides = split_overrides(args.words)
    if not inputs:
        raise ValueError("there is nothing to upsample; give a video, saved tokens, or pictures")
    config = load_config(UpsampleConfig, args.config, overrides)
    upsampler = open_upsampler(args.model or DEFAULT_DIRECTORY, args.direct, args.iterative, config)
    reader = FootageReader(upsampler.image_tokenizer, upsampler.direct.config.low_res_side)
    footage = reader.open([Path(word) for word in inputs], args.fps)
    if args.caption is not None:
        keys = sample_keys(config.seed, [args.caption], len(footage.tokens))
    elif footage.samples:
        keys = [SampleKey(config.seed, *sample) for sample in footage.samples]
    else:
        raise ValueError("nobody says what the input shows; give --caption")
    if not all(key.caption.strip() for key in keys):
        raise ValueError("the caption is empty; describe what the input shows")
    seconds = footage.seconds or float(max(footage.num_frames - 1, 1))  # pictures: one a second
    make(args, UpsampleJob(upsampler, keys, footage.tokens, seconds), args.out, processes)


def open_upsampler(bundle: Path, direct: Path, iterative: Path | None, config: "UpsampleConfig") -> "Upsampler":
    """Raises: FileNotFoundError; ValueError, in one line, for what is damaged or does not belong together."""
    from dataclasses import replace

    import torch

    from cogvideo.checkpoint.format import MANIFEST, load_checkpoint
    from cogvideo.checkpoint.model_io import superres_of
    from cogvideo.files import sha256_file
    from cogvideo.model.linear import convert_weights, stream_layers
    from cogvideo.sampling.bundle import ACTIVATIONS, open_tokenizers
    from cogvideo.sampling.clusters import PUBLISHED_CLUSTERS, kmeans_labels
    from cogvideo.sampling.device import open_device
    from cogvideo.sampling.upsample import Upsampler

    device = open_device(config.device)
    text, image, labels = open_tokenizers(bundle)
    models = {}
    for method, place in (("direct", direct), ("iterative", iterative)):
        if place is None:
            continue
        model = superres_of(load_checkpoint(place))
        known = model.config.vocabulary
        if model.config.method != method:
            raise ValueError(f"--{method} {place} holds the {model.config.method} model; give the other one")
        if image.num_tokens != known.num_image_tokens or replace(text.vocabulary, size=known.size) != known:
            raise ValueError(f"{place} and the tokenizers of {bundle} do not belong together; use one family")
        convert_weights(model, config.weights, ACTIVATIONS[config.weights] if device.type != "cpu" else torch.float32)
        if config.stream_layers:
            stream_layers(model)
        models[method] = model.to(device)
    fine = {model.config.high_res_side for model in models.values()}
    if len(fine) > 1:
        raise ValueError(f"{direct} and {iterative} make grids of different sizes; use one family")
    image.model.to(device)
    if labels is None or config.num_clusters is not None:
        codebook = image.codebook.detach().float().cpu().numpy()
        labels = kmeans_labels(codebook, config.num_clusters or min(PUBLISHED_CLUSTERS, len(codebook)))
    places = [place for place in (direct, iterative) if place is not None]
    return Upsampler(
        models["direct"],
        models.get("iterative"),
        image,
        text.encode,
        labels,
        config,
        tuple(sha256_file(place / MANIFEST) for place in places),
    )
