"""Small prepared folders written directly, and a text tokenizer of single bytes: for tests of datasets and loaders."""

import numpy as np

from cogvideo.data.shards import FORMATS, ROW, VERSION, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.sequence.layout import Vocabulary

VOCABULARY = Vocabulary(size=400, num_image_tokens=64, pad=64, newline=65, start_of_image=66)


class ByteTokenizer:
    """A text tokenizer of single bytes."""

    vocabulary = VOCABULARY

    def encode(self, text):
        return [100 + byte for byte in text.encode()]


def decode(ids):
    return bytes(i - 100 if i >= 100 else ord("|") for i in ids.tolist()).decode()


def make_prepared(folder, kind="tokens", first_row=0, frame_len=4, codes="a", lengths=(4.0, 2.0, 2.0, 2.0)):
    """Write two shards: captions 0..5, each with one row of 4 s and three of 2 s; tokens hold the row's number."""
    shards = []
    for index in range(2):
        rows = [(3 * index + c, s, 0.0) for c in range(3) for s in lengths]
        first = first_row + 12 * index
        if kind == "tokens":
            array = (first + np.arange(12)[:, None, None] + 0 * np.zeros((12, 5, frame_len))).astype(np.uint16)
            array[:, :, 1] = np.arange(5)
        else:
            array = np.full((12, 6, 6, 3), first, np.uint8) + np.arange(12, dtype=np.uint8)[:, None, None, None]
        write_shard(shard_folder(folder, index), {"rows.npy": np.array(rows, ROW), f"{kind}.npy": array}, [])
        shards.append(read_shard(shard_folder(folder, index)))
    (folder / "captions.jsonl").write_text("".join(f'{{"text": "clip {first_row // 4 + c}"}}\n' for c in range(6)))
    tokenizer = {"num_tokens": 64, "sha256": {"model": codes}} if kind == "tokens" else None
    plan = {"format": FORMATS[kind], "version": VERSION, "tokenizer": tokenizer}
    write_manifest(folder, plan, shards)
    return folder
