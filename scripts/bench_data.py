"""Time and memory that a data set of millions of clips takes before the first training step. Prints one JSON line.

    python scripts/bench_data.py --rows 2000000 --work /dev/shm/bench_data
    python scripts/bench_data.py --rows 2000                    # takes seconds
    python scripts/bench_data.py --decode --seconds 4           # decoding against a bare PyAV loop, and tar reading

The data set is synthetic: per row a video's name, a caption of some 60 characters and a clip of five frames of 4
tokens, with 256 rows per shard. It stays in `--work` and is reused for the same `--rows`. Each case runs in its own
process:

    captions   `cogvideo prepare` reads and checks the captions file and groups it by video
    open       the prepared folder is opened
    loader     ... and the first batch of 32 clips is made, with clip lengths balanced

`seconds` is wall-clock time and `cpu_s` CPU time; `peak_mb`, peak resident memory above that after imports; `own_mb`,
resident memory at the end that is not a mapped file, imports included; `files`, the number of open files. Files in
`--work` that were just written are read from the page cache, not from a disk.

`--decode` compares three ways to read a video: `cogvideo prepare` (finding the frames, planning the clips, decoding,
scaling, cropping; not encoding), the same without its sandboxed child process, and a bare PyAV loop. Per caption, the
loop opens the file, seeks to the first frame that `prepare` uses, decodes everything up to the last one on all cores,
and scales and crops the frames that `prepare` uses, with the same scaler. It is given their times and checks nothing.
Files are generated: 1080p, 360p, 360p with one key frame, two short captions in a long video, and 360p of which every
frame is used. The three take turns; figures are medians over `--repeats`.

CPU time includes child processes. `cpu_ratio` and `wall_ratio` are the loop's time divided by ours, `frames_per_cpu_s`
and `frames_per_s` the frames that the loop decodes divided by our time (`prepare` itself skips those that it does not
need); `child_cost`, the fraction that the child process adds to CPU time; `child_cost_encoded`, the same for decoding
and encoding with the bundled image tokenizer, which is far smaller than the published one; `peak_mb`, the peak of our
process above that after imports; `child_mb`, the child's whole peak. `child` is the cost of starting a child process,
paid once per decoding thread. `tar` compares reading the samples of a WebDataset tar with reading it from end to end.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cogvideo.cli.main import run_command
from cogvideo.data.captions import Caption
from cogvideo.data.dataset import ClipDataset
from cogvideo.data.encode import TokenEncoder
from cogvideo.data.extract import VideoJob
from cogvideo.data.loader import ClipLoader, LoaderConfig
from cogvideo.data.prepare import Preparation, PrepareConfig
from cogvideo.data.readers import open_captions
from cogvideo.data.shards import FORMATS, ROW, VERSION, Kind, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.files import BUNDLED_WEIGHTS, read_json
from cogvideo.media import video, worker
from cogvideo.media.frame_index import index_frames
from cogvideo.media.pixels import SCALING
from cogvideo.sequence.layout import Vocabulary
from cogvideo.tokenizers.image import open_image_tokenizer

ROWS_PER_SHARD = 256
CASES = ("captions", "open", "loader")
VIDEOS = {  # width, height, frames between key frames (0: one key frame), how many times as long as --seconds
    "1080p": (1920, 1080, 25, 1),
    "360p": (640, 360, 25, 1),
    "long_gop": (640, 360, 0, 1),
    "short_captions": (640, 360, 50, 15),
    "every_frame": (640, 360, 25, 1),
}
SIDE, FPS, ENCODE_BATCH = 160, 25, 16
TAR_SAMPLES, TAR_MEMBER_BYTES = 400, 1 << 19


class ByteTokenizer:
    """A text tokenizer of single bytes."""

    vocabulary = Vocabulary(size=400, num_image_tokens=64, pad=64, newline=65, start_of_image=66)

    def encode(self, text: str) -> list[int]:
        return [100 + byte for byte in text.encode()]


def make_dataset(work: Path, rows: int) -> None:
    """Write work/captions.jsonl and the prepared folder work/clips, unless they exist.

    Raises: ValueError if they have another number of rows.
    """
    manifest = work / "clips" / "manifest.json"
    if manifest.is_file():
        if (found := read_json(manifest, dict[str, Any])["rows"]) != rows:
            raise ValueError(f"{work} holds a data set of {found} rows, got --rows {rows}; give another --work")
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


def measure_decoding(case: str, work: Path, seconds: float, repeats: int) -> dict[str, float]:
    """One kind of video: `prepare`, the same in one process, and a bare PyAV loop in turn, over the same file."""
    length = seconds * VIDEOS[case][3]
    path = work / f"{case}.mp4"
    spans = [(0.0, None)]
    if case == "short_captions":
        spans = [(length / 4, length / 4 + 2), (length * 3 / 4, length * 3 / 4 + 2)]
    captions = work / f"{case}.jsonl"
    lines = [json.dumps({"video": path.name, "caption": "a", "start": start, "end": end}) for start, end in spans]
    captions.write_text("\n".join(lines))
    kind: Kind = "frames" if case == "every_frame" else "tokens"
    config = PrepareConfig(frame_pixels=SIDE, frames_per_video=round(length * FPS))
    extractor = Preparation(captions, work / "out", kind, config).extractor
    job = VideoJob(path.name, tuple((i, Caption(path.name, "a", *span)) for i, span in enumerate(spans)))
    start_mb = _peak_mb()
    extractor.decode(job)
    peak_mb, child_mb = _peak_mb() - start_mb, max(map(_peak_mb, _children()))  # before the other ways have run
    wanted = extractor.plan(job).times
    parts = [wanted[(wanted >= start) & (wanted <= (end or length))] for start, end in spans]
    ours, unlimited, bare, frames = [], [], [], 0
    for _ in range(repeats):  # in turn, so that all run under the same load
        ours.append(_timed(lambda: extractor.decode(job))[1:])
        with patch.multiple(video, index_frames=index_frames, read_frames=_read_frames_here):
            unlimited.append(_timed(lambda: extractor.decode(job))[2])
        frames, *spent = _timed(lambda: _bare_loop(path, parts))
        bare.append(spent)
    encoder, pixels = (
        TokenEncoder(open_image_tokenizer(BUNDLED_WEIGHTS / "image_tokenizer"), "cpu"),
        extractor.decode(job)[1],
    )
    encode_cpu = _timed(lambda: [encoder(batch) for batch in np.array_split(pixels, -(-len(pixels) // ENCODE_BATCH))])[
        2
    ]
    (our_wall, our_cpu), (wall, cpu) = (np.median(np.array(t), axis=0).tolist() for t in (ours, bare))
    return {
        "frames": frames,
        "frames_per_cpu_s": round(frames / our_cpu),
        "frames_per_s": round(frames / our_wall),
        "cpu_ratio": round(cpu / our_cpu, 2),
        "wall_ratio": round(wall / our_wall, 2),
        "child_cost": round(our_cpu / median(unlimited) - 1, 3),
        "child_cost_encoded": round((our_cpu + encode_cpu) / (median(unlimited) + encode_cpu) - 1, 3),
        "peak_mb": round(peak_mb),
        "child_mb": round(child_mb),
    }


def _read_frames_here(*request: Any) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """`sandbox.read_frames` without the child process."""
    for fields, (pixels,) in worker.decode(*request):
        yield pixels, fields["time"]


def measure_child(work: Path) -> dict[str, float]:
    """Measure the start of a child process that reads media."""
    path = work / "360p.mp4"
    first, second = (_timed(lambda: video.probe_video(path))[1:] for _ in range(2))
    return {"start_s": round(first[0] - second[0], 2), "start_cpu_s": round(first[1] - second[1], 2)}


def _bare_loop(path: Path, parts: list[Any]) -> int:
    """Decode each span from the key frame before it, scaling and cropping the wanted frames -> frames decoded."""
    count = 0
    for wanted in parts:
        reformatter = VideoReformatter()
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if wanted[0] > 0:
                container.seek(int(wanted[0] / stream.time_base), stream=stream)
            left = {round(time * FPS) for time in wanted.tolist()}
            for frame in container.decode(stream):
                count += 1
                number = round(float(frame.time) * FPS)
                if number in left:
                    left.remove(number)
                    scale = SIDE / min(frame.width, frame.height)
                    size = round(frame.width * scale), round(frame.height * scale)
                    scaled = reformatter.reformat(frame, *size, "rgb24", interpolation=SCALING, threads=1)
                    pixels = scaled.to_ndarray()
                    middle = (pixels.shape[1] - SIDE) // 2
                    np.ascontiguousarray(pixels[:, middle : middle + SIDE])
                if not left:
                    break
    return count


def _write_noise(path: Path, case: str, seconds: float) -> None:
    """Write the video of a case: moving blocks with film grain, so that decoding costs what camera footage would."""
    width, height, key_frames, times = VIDEOS[case]
    count = round(seconds * times * FPS)
    rng = np.random.default_rng(0)
    ground = rng.integers(40, 200, (height // 20 + 1, width // 20 + 9, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    grain = rng.integers(0, 12, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "23", "g": str(key_frames or count), "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(count):
            left = index % 160
            pixels = ground[:height, left : left + width] + np.roll(grain, 37 * index, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def measure_tar(work: Path, repeats: int) -> dict[str, float]:
    """Find all samples of a tar, and read all bytes of its members in place, against reading the whole file."""
    path, content = work / "shard-000.tar", os.urandom(TAR_MEMBER_BYTES)
    with tarfile.open(path, "w") as tar:
        for index in range(TAR_SAMPLES):
            for suffix, data in (("mp4", content), ("txt", b"a dog runs")):
                member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    whole, scan, members = [], [], []
    for _ in range(repeats):
        whole.append(_timed(lambda: _read_whole(path))[1])
        captions, seconds, _cpu = _timed(lambda: open_captions(path))
        scan.append(seconds)
        members.append(_timed(lambda captions=captions: sum(map(_read_member, captions)))[1])
    megabytes = path.stat().st_size / 1e6
    return {
        "mb": round(megabytes),
        "whole_mb_per_s": round(megabytes / median(whole)),
        "members_mb_per_s": round(megabytes / median(members)),
        "scanned_samples_per_s": round(TAR_SAMPLES / median(scan)),
    }


def _read_whole(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def _read_member(caption: Caption) -> int:
    assert caption.source is not None
    with open(caption.source.file, "rb", buffering=0) as file:
        file.seek(caption.source.start)
        return len(file.read(caption.source.size))


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `work` returns, wall-clock seconds, CPU seconds of all threads and child processes."""
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    result = work()
    return result, time.perf_counter() - start, _cpu_seconds() - cpu_start


def _cpu_seconds() -> float:
    """CPU time of this process and its children, living and ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    clocks = [(~child << 3) | 2 for child in _children()]  # Linux's numbers for the CPU clocks of other processes
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(time.clock_gettime, clocks))


def _children() -> list[int]:
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def _peak_mb(process: int | str = "self") -> float:
    """Peak resident memory of a process; `ru_maxrss` would include what its parent had before starting it."""
    return int(Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--work", type=Path, help="folder for the synthetic data (default: a temporary one)")
    parser.add_argument("--decode", action="store_true", help="measure decoding and tar reading instead")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of the generated videos")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=(*CASES, *VIDEOS, "child", "tar"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case == "child":
        return print(json.dumps(measure_child(args.work)))
    if args.case == "tar":
        return print(json.dumps(measure_tar(args.work, args.repeats)))
    if args.case in VIDEOS:
        return print(json.dumps(measure_decoding(args.case, args.work, args.seconds, args.repeats)))
    if args.case:
        return print(json.dumps(measure(args.case, args.work)))
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result: dict[str, object] = {"seconds": args.seconds} if args.decode else {"rows": args.rows}
        if not args.decode:
            make_dataset(work, args.rows)
        for case in (*VIDEOS, "child", "tar") if args.decode else CASES:
            if case in VIDEOS:
                _write_noise(work / f"{case}.mp4", case, args.seconds)
            command = [sys.executable, __file__, "--case", case, "--work", str(work)]
            command += ["--seconds", str(args.seconds), "--repeats", str(args.repeats)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[case] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main, "bench_data"))
