"""Copy a bundle, or one model, with room for longer clips or larger frames, ready for finetuning.

    cogvideo extend BUNDLE --num-frames 9 --out DIR
    cogvideo extend BUNDLE --frame-side 10 --out DIR

Until it is finetuned, stage 1 of a copy with more frames generates the same first frames as the original; the position
embeddings of new frames start as those of the last old frame. Stage 2 keeps its number of frames, since it handles any
number of key frames. Position embeddings of larger frames are interpolated from the old ones. To add text pieces, use
`cogvideo vocabulary --extend`.
"""

import argparse
from pathlib import Path

from cogvideo.cli._common import weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=weights, metavar="BUNDLE", help="the bundle, or a checkpoint, to copy")
    parser.add_argument("--num-frames", type=int, metavar="N", help="frames per clip of stage 1")
    parser.add_argument("--frame-side", type=int, metavar="N", help="tokens along each side of a frame")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def run(args: argparse.Namespace) -> None:
    from cogvideo.hub import describe
    from cogvideo.locks import lock_output
    from cogvideo.logs import get_logger
    from cogvideo.sampling.extend import extend_clips

    if args.num_frames is None and args.frame_side is None:
        raise ValueError("nothing to extend; give --num-frames, --frame-side or both")
    if args.out.resolve() == args.directory.resolve():
        raise ValueError(f"--out {args.out} is the original itself; choose another name")
    with lock_output(args.out):
        if args.out.exists() and not args.overwrite:
            raise FileExistsError(f"{args.out} exists; choose another name, or --overwrite to replace it")
        left_out = extend_clips(
            *(args.directory, args.out),
            num_frames=args.num_frames,
            frame_side=args.frame_side,
            overwrite=args.overwrite,
        )
    if left_out:
        get_logger().warning("left out, since frames are larger now: %s", ", ".join(left_out))
    names = {"num_frames": args.num_frames, "frame_side": args.frame_side}
    changes = " ".join(f"{name}={value}" for name, value in names.items() if value is not None)
    print(f"{args.out}: {describe(args.directory)} with {changes}")
