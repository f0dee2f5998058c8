"""Assemble trained parts into one folder that `cogvideo sample --model` reads.

    cogvideo bundle --text text.model --tokenizer DIR --trunk DIR --sequential DIR [--interpolation DIR] --out DIR

Each part is the `export` folder of a training run. A trunk that models share is stored once. Without stage 2 a bundle
is sampled with rounds=0.
"""

import argparse
from pathlib import Path

from cogvideo.cli._common import local_path, weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=weights, required=True, metavar="FILE", help="text tokenizer")
    parser.add_argument("--tokenizer", type=weights, required=True, metavar="DIR", help="image tokenizer")
    parser.add_argument("--trunk", type=weights, required=True, metavar="DIR", help="draws the first frame")
    parser.add_argument("--sequential", type=weights, required=True, metavar="DIR", help="stage 1")
    parser.add_argument("--interpolation", type=weights, metavar="DIR", help="stage 2 (default: key frames only)")
    parser.add_argument(
        "--direct", type=weights, metavar="DIR", help="direct super-resolution, for `cogvideo upsample`"
    )
    parser.add_argument("--iterative", type=weights, metavar="DIR", help="iterative super-resolution")
    parser.add_argument(
        "--high-res-tokenizer",
        type=weights,
        metavar="DIR",
        help="image tokenizer of super-resolution's large frames (default: that of --tokenizer)",
    )
    parser.add_argument("--sampling", type=Path, metavar="FILE", help="settings that suit these weights (.yaml)")
    parser.add_argument(
        "--examples", type=Path, metavar="FILE", help="example prompts for `cogvideo demo`, one per line"
    )
    parser.add_argument(
        "--clusters",
        type=_clusters,
        default=500,
        metavar="N or FILE",
        help="clusters of the image codes: their number, or a .npy file with the cluster of each code (published: 500)",
    )
    parser.add_argument(
        "--high-res-clusters",
        type=_clusters,
        metavar="N or FILE",
        help="the same for the codes of --high-res-tokenizer (default: the same number as --clusters)",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="type of the stored transformers"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the bundle to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def run(args: argparse.Namespace) -> None:
    from cogvideo.dtypes import FLOAT_DTYPES
    from cogvideo.locks import lock_output
    from cogvideo.sampling.assemble import Parts, assemble_bundle
    from cogvideo.sampling.bundle import BundleConfig
    from cogvideo.text import read_prompts

    parts = Parts(
        args.text,
        args.tokenizer,
        args.trunk,
        args.sequential,
        args.interpolation,
        sampling=args.sampling,
        direct=args.direct,
        iterative=args.iterative,
        high_res_tokenizer=args.high_res_tokenizer,
    )
    dtype = FLOAT_DTYPES[args.dtype]
    config = BundleConfig(examples=read_prompts(args.examples) if args.examples else [])
    with lock_output(args.out):
        assemble_bundle(
            args.out,
            parts,
            config=config,
            clusters=args.clusters,
            high_res_clusters=args.high_res_clusters,
            dtype=dtype,
            overwrite=args.overwrite,
        )
    files = [path for path in sorted(args.out.rglob("*")) if path.is_file()]
    for path in files:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(args.out)}")
    print(f"{sum(path.stat().st_size for path in files) / 1e6:8.2f} MB in all")
    print(_describe_settings(args.sampling, args.out))


def _clusters(text: str) -> int | Path:
    """A number, else the path of a file."""
    try:
        return int(text)
    except ValueError:
        return local_path(text)


def _describe_settings(file: Path | None, out: Path) -> str:
    """Which settings `cogvideo sample` uses with the bundle, in one line."""
    from cogvideo.sampling.bundle import load_sample_config

    settings = load_sample_config(out, [], [])
    source = "the published ones, since there is no --sampling FILE" if file is None else f"those of {file}"
    key_frames = settings.key_frames
    return (
        f"sampling settings: {source} (seconds={settings.seconds:g} rounds={settings.rounds} "
        f"first_frame.top_k_clusters={settings.first_frame.top_k_clusters} "
        f"key_frames.guidance_scale={'null' if key_frames.guidance_scale is None else key_frames.guidance_scale} "
        f"key_frames.top_k_clusters={key_frames.top_k_clusters}); edit {out / 'sampling.yaml'} to change them"
    )
