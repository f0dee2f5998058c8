"""Score given clips under a model: the negative log-likelihood of every token.

Use it to verify a conversion, or to compare checkpoints.

    cogvideo score --model models/stage1 --rows rows.bin --out scores.safetensors
    cogvideo score --model export/sequential --rows data/clips --text-tokenizer text.model --out scores.safetensors

--rows is a file of published training rows (int32 without a header: text ids, then frames), or a folder that `cogvideo
prepare` made. The result holds `losses` (clips, frames, tokens per frame) in nats, and with --logits also `logits`
(clips, slots, image tokens), which take 160 MB per clip at the published size. Means per frame are printed.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideo.cli._common import device_from, refuse_replaced_inputs, weights

if TYPE_CHECKING:
    from cogvideo.evaluation.likelihood import ScoredClips
    from cogvideo.model.config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=weights, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--rows", type=Path, required=True, metavar="PATH", help="file of published rows, or prepared folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors file to write")
    parser.add_argument("--logits", action="store_true", help="also store the logits of all image tokens")
    parser.add_argument(
        "--text-tokenizer", type=weights, metavar="FILE", help="for a prepared folder: encodes captions"
    )
    parser.add_argument("--video-suffix", action="store_true", help="for a prepared folder: append it to captions")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="clips per batch (default 4)")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N clips")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="compute in this type (default: as stored)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--dry-run", action="store_true", help="check all inputs and write nothing")


def run(args: argparse.Namespace) -> None:
    from cogvideo.checkpoint.load import load_model
    from cogvideo.dtypes import FLOAT_DTYPES
    from cogvideo.evaluation.likelihood import score_clips
    from cogvideo.locks import lock_output
    from cogvideo.logs import progress

    for name in ("batch", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}; expected at least 1")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: expected a name that ends in .safetensors")
    refuse_replaced_inputs("--out", args.out, [args.rows, args.text_tokenizer], [args.model])
    device = device_from(args.device)
    dtype = FLOAT_DTYPES[args.dtype] if args.dtype else None
    model = load_model(args.model, dtype=dtype, device=device)
    config = model.config
    if not config.has_temporal_channel:
        raise ValueError(f"{args.model} is a text-to-image model; score reads clips, give a stage 1 or stage 2 model")
    source = _open(args, config)
    count = min(source.count, args.limit or source.count)
    if args.dry_run:
        print(f"{count} clips of {config.num_frames} frames; nothing was written")
        return
    with lock_output(args.out), progress(count, "scoring", "clips") as bar:
        means = score_clips(
            model, source, args.out, count=count, batch_size=args.batch, logits=args.logits, progress=bar.update
        )
    print(means.summary(config))
    print(args.out)


def _open(args: argparse.Namespace, config: "ModelConfig") -> "ScoredClips":
    from cogvideo.checkpoint.format import load_checkpoint
    from cogvideo.config import from_dict
    from cogvideo.evaluation.likelihood import open_prepared_clips, open_published_rows
    from cogvideo.sequence.prompt import PromptFormat
    from cogvideo.tokenizers.records import TokenizerRecords

    if not args.rows.is_dir():
        if args.text_tokenizer is not None or args.video_suffix:
            option = "--video-suffix" if args.text_tokenizer is None else "--text-tokenizer"
            raise ValueError(f"{option} is for prepared folders, and {args.rows} is not one; leave it out")
        return open_published_rows(args.rows, config)
    if args.text_tokenizer is None:
        raise ValueError(f"{args.rows} is a prepared folder; give --text-tokenizer FILE to encode its captions")
    extra = load_checkpoint(args.model, verify=False).extra
    prompt = from_dict(PromptFormat, extra.get("prompt", {}), str(args.model))
    records = TokenizerRecords.of_export(extra)
    return open_prepared_clips(
        args.rows, config, args.text_tokenizer, prompt, suffix=args.video_suffix, trained_with=records
    )
