"""Time and memory that a data set of millions of clips takes before the first training step. Prints one JSON line.

    python scripts/bench_data.py --rows 2000000 --work /dev/shm/bench_data
    python scripts/bench_data.py --rows 2000                    # takes seconds

The data set is synthetic: per row a video, a caption of some 60 characters and a clip of five frames of 4 tokens, with
256 rows per shard. It stays in `--work` and is reused. Each case runs in its own process:

    captions   `cogvideo prepare` reads and checks the captions file and groups it by video
    open       the prepared folder is opened
    loader     ... and the first batch of 32 clips is made, with clip lengths balanced

`seconds` is wall-clock time and `cpu_s` CPU time; `peak_mb`, peak resident memory above that after imports; `own_mb`,
resident memory at the end that is not a mapped file, imports included; `files`, the number of open files. Files in
`--work` that were just written are read from the page cache, not from a disk.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cogvideo.cli.main import run_command
from cogvideo.data.dataset import ClipDataset
from cogvideo.data.loader import ClipLoader, LoaderConfig
from cogvideo.data.prepare import Preparation, PrepareConfig
from cogvideo.data.shards import FORMATS, ROW, VERSION, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.sequence.layout import Vocabulary

ROWS_PER_SHARD = 256
CASES = ("captions", "open", "loader")


class ByteTokenizer:
    """A text tokenizer of single bytes."""

    vocabulary = Vocabulary(size=400, num_image_tokens=64, pad=64, newline=65, start_of_image=66)

    def encode(self, text: str) -> list[int]:
        return [100 + byte for byte in text.encode()]


def make_dataset(work: Path, rows: int) -> None:
    """Write work/captions.jsonl and the prepared folder work/clips, unless they exist."""
    if (work / "clips" / "manifest.json").is_file():
        return
    caption = "a person in a {} coat walks past shop number {} in the rain"
    colours = ("red", "green", "blue", "black")
    (work / "clips").mkdir(parents=True, exist_ok=True)
    with open(work / "captions.jsonl", "w") as source, open(work / "clips" / "captions.jsonl", "w") as prepared:
        for row in range(rows):
            video, text = f"part{row // 1000:05d}/{row:08d}.mp4", caption.format(colours[row % 4], row)
            source.write(json.dumps({"video": video, "caption": text}) + "\n")
            prepared.write(json.dumps({"video": video, "text": text, "start": 0.0, "end": None}) + "\n")
    shards = []
    for index, first in enumerate(range(0, rows, ROWS_PER_SHARD)):
        ids = np.arange(first, min(first + ROWS_PER_SHARD, rows))
        table = np.zeros(len(ids), ROW)
        table["caption"], table["seconds"] = ids, 2.0 ** (ids % 3)
        tokens = np.broadcast_to((ids % 64).astype(np.uint16)[:, None, None], (len(ids), 5, 4))
        folder = shard_folder(work / "clips", index)
        write_shard(folder, {"rows.npy": table, "tokens.npy": np.ascontiguousarray(tokens)}, [])
        shards.append(read_shard(folder))
    plan = {"format": FORMATS["tokens"], "version": VERSION, "tokenizer": {"num_tokens": 64}}
    write_manifest(work / "clips", plan, shards)


def measure(case: str, work: Path) -> dict[str, float]:
    start_mb, start, cpu_start = _peak_mb(), time.perf_counter(), time.process_time()
    alive: list[object] = []  # keeps objects until memory is read
    if case == "captions":
        alive.append(Preparation(work / "captions.jsonl", work / "out", "tokens", PrepareConfig()))
    else:
        clips = ClipDataset(work / "clips")
        alive.append(clips)
        if case == "loader":
            loader = ClipLoader(clips, ByteTokenizer(), LoaderConfig(batch_size=32, balance_lengths=True))
            alive += [loader, loader.batch(0)]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu_seconds, 2),
        "peak_mb": round(_peak_mb() - start_mb),
        "own_mb": round(int(status["RssAnon"].split()[0]) / 1024),
        "files": len(os.listdir("/proc/self/fd")),
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--work", type=Path, help="folder for the synthetic data (default: a temporary one)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return print(json.dumps(measure(args.case, args.work)))
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        make_dataset(work, args.rows)
        result: dict[str, object] = {"rows": args.rows}
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--work", str(work)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[case] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main, "bench_data"))
