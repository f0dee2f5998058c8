"""Train a text tokenizer on captions; its ids follow the image tokenizer's codes.

    cogvideo vocabulary --captions FILE --tokenizer DIR --out text.model [--pieces 512]

Clip lengths, prompt suffixes and single bytes are pieces too, so any text can be encoded.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captions", type=Path, required=True, metavar="FILE", help="captions, .jsonl or .tsv")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="the image tokenizer")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model file to write")
    parser.add_argument(
        "--pieces", type=int, default=512, help="maximum number of text pieces, 256 of which are single bytes"
    )


def run(args: argparse.Namespace) -> None:
    from cogvideo.data.readers import open_captions
    from cogvideo.tokenizers.image import open_image_tokenizer
    from cogvideo.tokenizers.text import TextTokenizer

    captions = [caption.text for caption in open_captions(args.captions)]
    num_codes = open_image_tokenizer(args.tokenizer).num_tokens
    tokenizer = TextTokenizer.train(captions, args.out, args.pieces, num_codes)
    sample = captions[0]
    size = tokenizer.vocabulary.size
    print(f"{args.out}: {size} ids, {num_codes} of them image codes; trained on {len(captions)} captions")
    print(f"{sample!r} takes {len(tokenizer.encode(sample))} tokens")
