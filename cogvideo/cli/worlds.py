"""Write a synthetic world as videos and captions, ready for `cogvideo prepare`.

cogvideo worlds bodies --out DIR --count N [--seed 0] [--split train|test|unseen] [--pixels 192|64] [--processes 1]

bodies: balls, boxes and cylinders roll, fall and collide for 4 s at 8 frames per second; the simulator's states are
stored beside each clip. --split unseen shows combinations of colour, shape and event that never occur in train.
--pixels 192 writes each clip at 192 and at 64 pixels; --pixels 64 only at 64, twice as fast. To continue a run that was
stopped, repeat the command.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("world", choices=("bodies",), help="which world")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, or to continue")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="number of clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "test", "unseen"), default="train", help="default: train")
    parser.add_argument(
        "--pixels", type=int, choices=(64, 192), default=192, help="side of rendered frames (default: 192)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="number of processes; does not affect the result (default: 1)",
    )


def run(args: argparse.Namespace) -> None:
    from cogvideo.locks import lock_folder
    from cogvideo.worlds.bodies.files import Settings, write_dataset

    settings = Settings(args.split, args.seed, args.pixels)
    with lock_folder(args.out):
        print(write_dataset(args.out, settings, args.count, processes=args.processes))
