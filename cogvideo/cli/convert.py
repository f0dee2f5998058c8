"""Convert a published checkpoint (a SwissArmyTransformer folder) to a cogvideo checkpoint, or back.

    cogvideo convert --from cogvideo-stage1 --to models/stage1
    cogvideo convert --from models/stage1 --to out --to-sat

The checkpoint is the folder with a file `latest`; it may be nested in DIR, or in a repository of the Hugging Face hub,
USER/REPO[/FOLDER][@REVISION]. The kind of model (a CogVideo stage, CogView2's trunk or one of its super-resolution
models) is inferred from its tensors.

Keys: vocab.num_image_tokens, vocab.pad, vocab.newline, vocab.start_of_image (default: icetk's), task, num_heads,
text_len, frame_side, window_size (default: the checkpoint's), frame_position_start (default: 512). A key that the model
does not have is refused. A checkpoint that --to-sat wrote records all of them in its cogvideo.json.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="DIR", help="checkpoint to read, or USER/REPO"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="type to store (default: the source's)")
    parser.add_argument("--to-sat", action="store_true", help="convert a cogvideo checkpoint to the published format")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="with --to-sat: number of model-parallel files"
    )
    parser.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave out this tensor of the source"
    )
    parser.add_argument("--verbose", action="store_true", help="print every tensor, not just a summary")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="a setting that the checkpoint does not record"
    )


def run(args: argparse.Namespace) -> None:
    from cogvideo.locks import lock_output

    with nullcontext() if args.dry_run else lock_output(args.to):
        _convert(args)


def _convert(args: argparse.Namespace) -> None:
    from cogvideo.checkpoint.sat.config import SatSettings
    from cogvideo.checkpoint.sat.convert import from_sat, to_sat
    from cogvideo.config import load_config
    from cogvideo.dtypes import FLOAT_DTYPES
    from cogvideo.hub import SAFE_FILES, SAT_FILES, describe, resolve
    from cogvideo.logs import get_logger, progress

    if args.to.exists():
        raise FileExistsError(f"{args.to} exists; choose another name")
    source = resolve(args.source, SAFE_FILES if args.to_sat else (*SAFE_FILES, *SAT_FILES))
    dtype = FLOAT_DTYPES[args.dtype] if args.dtype else None
    if args.to_sat:
        if args.overrides or args.drop:
            raise ValueError("--to-sat takes neither key=value nor --drop; leave them out")
        conversion = to_sat(source, args.to, dtype=dtype, ranks=args.ranks)
    else:
        if args.ranks != 1:
            raise ValueError("--ranks needs --to-sat; when reading, the files of all ranks are merged")
        settings = load_config(SatSettings, [], args.overrides)
        conversion = from_sat(source, args.to, settings, dtype=dtype, drop=tuple(args.drop))

    for mapping in conversion.mappings if args.verbose else conversion.dropped:
        print(mapping)
    print(
        f"{describe(source)}: {conversion.kind}, {conversion.num_parameters:,} parameters, {conversion.nbytes:,} bytes"
    )
    print(f"{len(conversion.written)} tensors mapped, {len(conversion.dropped)} dropped")
    if args.dry_run:
        return
    get_logger().info("checking the source's checksums, then writing")
    with progress(conversion.num_writes, "converting", "tensors") as bar:
        conversion.run(bar.update)
    print(f"{args.to}: written")
