"""Merge adapters into a model's weights and write the result as an ordinary checkpoint.

    cogvideo merge MODEL --adapter DIR[:SCALE] --out DIR

MODEL is the checkpoint folder that the adapters were trained on (init.checkpoint of their run). Sums are computed and
stored in float32, since bf16 and fp16 may round a small update away; --dtype stores them in less space. The result
holds all weights, including those of a frozen trunk.
"""

import argparse
from pathlib import Path

from cogvideo.cli._common import refuse_replaced_inputs, weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=weights, help="the checkpoint to add to; it is not changed")
    parser.add_argument(
        "--adapter",
        metavar="DIR[:SCALE]",
        action="append",
        required=True,
        help="an adapter; may be repeated to add several",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type to store (default: fp32)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def run(args: argparse.Namespace) -> None:
    from cogvideo.checkpoint.adapter import MAX_LOST, load_adapter, lost_share, write_merged
    from cogvideo.checkpoint.format import load_checkpoint
    from cogvideo.checkpoint.load import stored_config
    from cogvideo.dtypes import FLOAT_DTYPES
    from cogvideo.hub import describe
    from cogvideo.locks import lock_output
    from cogvideo.logs import get_logger
    from cogvideo.sampling.adapters import AdapterChoice

    choices = [AdapterChoice.parse(text) for text in args.adapter]
    if args.out.resolve() == args.model.resolve():
        raise ValueError(f"--out {args.out} is the model itself; choose another name")
    refuse_replaced_inputs("--out", args.out, [args.model, *(choice.folder for choice in choices)])
    with lock_output(args.out):
        if args.out.exists() and not args.overwrite:
            raise FileExistsError(f"{args.out} exists; choose another name, or --overwrite to replace it")
        if (args.model / "sequential").is_dir():
            part = describe(args.model / "sequential")
            raise ValueError(f"{describe(args.model)} is a bundle; give one of its models, such as {part}")
        checkpoint = load_checkpoint(args.model)
        adapters = [(load_adapter(choice.folder), choice.scale) for choice in choices]
        dtype = FLOAT_DTYPES[args.dtype]
        write_merged(args.out, checkpoint, stored_config(checkpoint), adapters, dtype=dtype)
    lost = lost_share(load_checkpoint(args.out, verify=False).extra, dtype)
    if lost > MAX_LOST:
        message = "storing as %s rounds away %.0f %% of the update; use --dtype fp32 to keep it"
        get_logger(__name__).warning(message, args.dtype, 100 * lost)
    layers = {layer for adapter, _ in adapters for layer in adapter.factors}
    print(f"{args.out}: {len(layers)} matrices changed, out of {len(checkpoint.names)} tensors")
