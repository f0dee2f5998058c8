"""Compare training runs: the settings that differ, their results, and their curves in one picture.

    cogvideo runs runs/a runs/b [--out runs.png]

Each DIR is the run_dir of a training run, which may still be going on. Columns are in the order given.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="DIR", type=Path, nargs="+", help="run folders to compare")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="draw losses, gradient norms and learning rates")


def run(args: argparse.Namespace) -> None:
    from cogvideo.training.runs import Run, differences, draw_runs, results, table

    if args.out is not None and args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: curves are drawn as a .png file; give a name that ends in .png")
    if args.out is not None and not args.out.parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    runs = [Run.read(folder) for folder in args.runs]
    names = ["", *(str(run.folder) for run in runs)]
    print(table([names, *results(runs), *differences(runs)]))
    if args.out is not None:
        draw_runs(runs, args.out)
        print(f"curves: {args.out}")
