"""Write moving digits as .mp4 files and a captions.jsonl, ready for `cogvideo prepare`.

cogvideo digits --out DIR [--split train|test] [--count 6000] [--seed 0] [--pixels 40] [--palette new]
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which handwritten digits to show")
    parser.add_argument("--count", type=int, default=6000, help="number of clips (default 6000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clips (default 0)")
    parser.add_argument("--pixels", type=int, default=40, help="side of a frame, a multiple of 40 (default 40)")
    parser.add_argument(
        "--palette",
        choices=("basic", "new"),
        default="basic",
        help="new: orange, violet and cream, which the bundled weights never saw (default: basic, their six colours)",
    )


def run(args: argparse.Namespace) -> None:
    from cogvideo.locks import lock_output
    from cogvideo.worlds.digits.files import write_dataset

    with lock_output(args.out):
        print(write_dataset(args.out, args.split, args.count, args.seed, pixels=args.pixels, palette=args.palette))
