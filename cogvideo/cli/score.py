"""The likelihood of given clips under a model, token by token: to verify a conversion, or to compare checkpoints.

    cogvideo score --model models/stage1 --rows rows.bin --out scores.safetensors
    cogvideo score --model export/sequential --rows data/clips --text-tokenizer text.model --out scores.safetensors

FILE is published training rows (headless int32: text ids, then frames), or a folder that `cogvideo prepare` made. The
result holds `losses` (clips, frames, tokens a frame), in nats, and with --logits also `logits` (clips, slots, image
tokens): 160 MB a clip at the published size. Per-frame means are printed.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideo.cli._common import device_from

if TYPE_CHECKING:
    from cogvideo.evaluation.clip_source import ClipSource
    from cogvideo.model.config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint of ours")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="published rows, or a prepared folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file to write")
    parser.add_argument("--logits", action="store_true", help="keep the scores of all image tokens too")
    parser.add_argument("--text-tokenizer", type=Path, metavar="FILE", help="for a prepared folder: reads its captions")
    parser.add_argument("--video-suffix", action="store_true", help="for a prepared folder: append it to captions")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="clips at once (default 4)")
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N clips only")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="compute in this type (default: as stored)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--dry-run", action="store_true", help="check all of it and score nothing")


def run(args: argparse.Namespace) -> None:
    from cogvideo.checkpoint.load import load_model
    from cogvideo.dtypes import FLOAT_DTYPES
    from cogvideo.evaluation.likelihood import FrameMeans, score, score_file
    from cogvideo.logs import progress
    from cogvideo.model.plan import plan_forward

    for name in ("batch", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}; expected at least 1")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: expected a name that ends in .safetensors")
    device = device_from(args.device)
    dtype = FLOAT_DTYPES[args.dtype] if args.dtype else None
    model = load_model(args.model, dtype=dtype, device=device)
    config = model.config
    if not config.has_temporal_channel:
        raise ValueError(f"{args.model} is a text-to-image trunk; score reads clips, give a stage 1 or stage 2 model")
    source = _open(args, config)
    clips = min(source.count, args.limit or source.count)
    shapes: dict[str, tuple[int, ...]] = {"losses": (clips, config.num_frames, config.frame_len)}
    if args.logits:
        shapes["logits"] = (clips, config.layout.num_slots, config.vocabulary.num_image_tokens)
    if args.dry_run:
        print(f"{clips} clips of {config.num_frames} frames; nothing was written")
        return

    plan, means = plan_forward(config).to(device), FrameMeans(config.num_frames)
    with score_file(args.out, shapes) as arrays, progress(clips, "scoring", "clips") as bar:
        for start in range(0, clips, args.batch):
            rows = range(start, min(start + args.batch, clips))
            kept = arrays["logits"][start : rows.stop] if args.logits else None
            losses = score(model, plan, source.batch(rows), kept)
            arrays["losses"][start : rows.stop] = losses
            means.add(losses)
            bar.update(len(rows))
    print(means.report(config))
    print(args.out)


def _open(args: argparse.Namespace, config: "ModelConfig") -> "ClipSource":
    from cogvideo.checkpoint.format import load_checkpoint
    from cogvideo.config import from_dict
    from cogvideo.evaluation.clip_source import prepared_clips, published_rows
    from cogvideo.sequence.prompt import PromptFormat

    if not args.rows.is_dir():
        return published_rows(args.rows, config)
    if args.text_tokenizer is None:
        raise ValueError(f"{args.rows} is a prepared folder; give --text-tokenizer FILE to read its captions")
    said = load_checkpoint(args.model, verify=False).extra.get("prompt", {})
    prompt = from_dict(PromptFormat, said, str(args.model))
    return prepared_clips(args.rows, config, args.text_tokenizer, prompt, suffix=args.video_suffix)
