"""Read small files that claim or unpack to gigabytes, and print the memory and time that reading takes.

    python scripts/check_hostile.py [--only PART] [--keep DIR]     # each file, as a command and as the page reads it
    python scripts/check_hostile.py --commands [--only PART]       # prepare, --first-frame and --continue, all at once
    python scripts/check_hostile.py --readers [--only PART]        # files that are no media, by hostile_readers.py
    python scripts/check_hostile.py --rows [--only NUMBER]         # thirteen faults that were found once, tried again

`tests/helpers/hostile.py` makes the media, `tests/helpers/bombs.py` the other files. `--rows` calls torture.py,
fuzz_files.py and attack_page.py, and takes minutes. Memory is the peak of the process that runs FFmpeg, and with
`--commands` that of the command and its children together; time is CPU time. The exit code is 1 if a command ends in a
traceback, a file takes more than MAX_MB or MAX_SECONDS (other than those in LARGE, whose pictures need it), or a row
shows its fault.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import hostile_readers
from hostile_readers import Outcome

from cogvideo.media import sandbox
from cogvideo.media.container import Limits
from cogvideo.media.video import LIMITS, UNTRUSTED, probe_video, read_video, write_video
from tests.helpers.bombs import bombs
from tests.helpers.hostile import hostile_media

MAX_MB, MAX_SECONDS = 330, 10
LARGE = ("canvas.", "large.png", "grows-", "frames.gif", "scans.jpg")
"""Pictures of up to 134 million pixels, which commands read; the page refuses them."""
TOGETHER = ("samples.mp4", "fragment.mp4", "tracks.mp4", "many-edits.mp4", "grows-mjpeg.mkv")
REPORTED = {
    "1": "2.1 GB",
    "2": "300 MB fetched from an address",
    "3": "340 MB",
    "4": "a traceback ended prepare",
    "5": "two trainings in a folder went on",
    "6": "a stray folder, advice to remove results, 7 of 10",
    "7": "54 of 800 in tracebacks",
    "8": "25 of 1,200 in tracebacks",
    "9": "--resume stopped, no file named",
    "10": "neither disk nor file named",
    "11": "a traceback",
    "12": "15.6 s and 382 MB (GIF), 6.6 s (PNG), 569 MB (tokens)",
    "13": "474 to 1,307 MB, 503 to all for 30 s",
}
"""What was measured when each fault was found, by its number."""
TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """Peak memory in MB and CPU time of a process and its descendants."""

    def __init__(self, chosen: Callable[[str], bool], root: int):
        """`chosen`: whether a process counts, by its command line."""
        self._chosen, self._root, self._end = chosen, root, threading.Event()
        self._peaks: dict[int, int] = {}
        self._seconds: dict[int, float] = {}
        self.together = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        return max(self._peaks.values(), default=0)

    @property
    def seconds(self) -> float:
        return sum(self._seconds.values())

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            now = 0
            for pid in _tree(self._root):
                try:
                    if not self._chosen(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")):
                        continue
                    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                except (OSError, ValueError):
                    continue
                if "VmHWM" in status:
                    now += int(status["VmRSS"].split()[0]) >> 10
                    self._peaks[pid] = int(status["VmHWM"].split()[0]) >> 10
                    self._seconds[pid] = (int(fields[11]) + int(fields[12])) / TICKS
            self.together = max(self.together, now)


def _tree(root: int) -> list[int]:
    """A process and all its descendants."""
    found = [root]
    for pid in found:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def read(path: Path, limits: Limits) -> str:
    """Read the first and the last frame of a file; returns how that ended."""
    try:
        info = probe_video(path, limits=limits)
        ends = info.seconds[[0, -1]] if len(info.seconds) > 1 else info.seconds
        read_video(path, side=16, only=ends, limits=limits)
    except ValueError as error:
        return "refused: " + str(error).replace(str(path), path.name)[:90]
    return f"{len(info.seconds)} frames of {info.width}x{info.height}"


def check(path: Path) -> bool:
    """Read a file with the limits of commands and of the page and print a row each; return whether both took little."""
    ok = True
    for door, limits in (("command", LIMITS), ("page", UNTRUSTED)):
        while sandbox._idle:
            sandbox._idle.pop().kill()
        with Watch(lambda line: sandbox.START in line, os.getpid()) as watch:
            outcome = read(path, limits)
        is_large = door == "command" and path.name.startswith(LARGE)
        ok = ok and (is_large or (watch.peak <= MAX_MB and watch.seconds <= MAX_SECONDS))
        size = path.stat().st_size
        print(f"| {path.name} | {size:,} | {door} | {watch.peak} | {watch.seconds:.1f} | {outcome} |", flush=True)
    return ok


def check_commands(folder: Path, names: list[str]) -> bool:
    """Give each file to three commands at once and print the peak memory of each, below that of an intact file."""
    import numpy as np

    write_video(folder / "sound.mp4", np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8), 4)
    ok = True
    print("| file | prepare | --first-frame | --continue |\n|---|---|---|---|", flush=True)
    for name in ("sound.mp4", *names):
        captions = folder / f"{name}.jsonl"
        captions.write_text(f'{{"video": "sound.mp4", "caption": "x"}}\n{{"video": "{name}", "caption": "y"}}\n')
        out, start = folder / f"out-{name}", [sys.executable, "-m", "cogvideo"]
        sample = [*start, "sample", "the red digit 3", "rounds=0"]
        commands = {
            "prepare": [*start, "prepare", "--captions", captions, "--frames", "--out", out / "p", "frame_pixels=40"],
            "--first-frame": [*sample, "--first-frame", folder / name, "--out", out / "f"],
            "--continue": [*sample, "--continue", folder / name, "--out", out / "c"],
        }
        running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for c in commands.values()]
        watches = [Watch(lambda line: True, process.pid).__enter__() for process in running]
        cells = []
        for process, watch in zip(running, watches, strict=True):
            said = process.communicate()[1].decode()
            watch.__exit__()
            ok = ok and process.returncode in (0, 2) and "Traceback" not in said
            cells.append(f"{watch.together} MB, {watch.seconds:.0f} s, exit code {process.returncode}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return ok


def page_outcome(folder: Path, name: str, limits: Limits = UNTRUSTED) -> Outcome:
    """Read one of the hostile media files, by default with the page's limits."""
    _make_elsewhere([name], folder)
    while sandbox._idle:
        sandbox._idle.pop().kill()
    with Watch(lambda line: sandbox.START in line, os.getpid()) as watch:
        text = read(folder / name, limits)
    ok = watch.peak <= MAX_MB and watch.seconds <= MAX_SECONDS
    return Outcome(f"{name}: {text}", watch.peak, watch.seconds, ok)


def check_rows(folder: Path, numbers: set[str]) -> bool:
    """Try faults of `REPORTED` again and print a row for each; returns whether none is left."""
    rows: dict[str, Callable[[Path], dict[str, Outcome]]] = {
        "1 samples": lambda place: {"1": page_outcome(place, "samples.mp4", LIMITS)},
        "1 fragment": lambda place: {"1": page_outcome(place, "fragment.mp4", LIMITS)},
        "3": lambda place: {"3": page_outcome(place, "grows-vp9.webm")},
        "4": lambda place: {"4": hostile_readers.odd_videos(place)},
        "8 text model": lambda place: {"8": hostile_readers.bomb_outcome(place, "text-model", "pieces")},
        "8 array": lambda place: {"8": hostile_readers.bomb_outcome(place, "npy", "claim")},
        "9": lambda place: {"9": hostile_readers.wrong_metrics(place)},
        "12 GIF": lambda place: {"12": page_outcome(place, "frames.gif")},
        "12 PNG": lambda place: {"12": page_outcome(place, "large.png")},
        "12 tokens": lambda place: {"12": hostile_readers.bomb_outcome(place, "tokens", "samples")},
        "5, 6": lambda place: hostile_readers.two_at_once(place),
        "10, 11": lambda place: hostile_readers.out_of_room(place),
        "7, 8": lambda _: hostile_readers.damaged(20),
        "2, 13": lambda _: hostile_readers.attacked(),
    }
    ok = True
    print("| fault | reported | now | MB | seconds |\n|---|---|---|---:|---:|", flush=True)
    for name, action in rows.items():
        if not numbers.isdisjoint(re.findall(r"\d+", name)):
            place = folder / "".join(filter(str.isalnum, name))
            place.mkdir(exist_ok=True)
            for number, outcome in action(place).items():
                ok = ok and outcome.ok
                text = outcome.text if outcome.ok else f"FAILED: {outcome.text}"
                row = f"{number} | {REPORTED[number]} | {text} | {outcome.mb or ''} | {outcome.seconds:.1f}"
                print(f"| {row} |", flush=True)
    return ok


def make(names: list[str], folder: Path) -> None:
    files = hostile_media()
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_bytes(files[name]())


def _make_elsewhere(names: list[str], folder: Path) -> None:
    """Make files in a separate process: processes that this one starts later would inherit its peak memory."""
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(names, folder))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(f"check_hostile: {', '.join(names)}: not made")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files with this in their names; with --rows the number of one row")
    parser.add_argument("--keep", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--commands", action="store_true", help="whole commands, three at once")
    parser.add_argument("--readers", action="store_true", help="files that are no media")
    parser.add_argument("--rows", action="store_true", help="retry faults found in the past")
    args = parser.parse_args()
    every = [f"{bomb.reader}/{bomb.name}" for bomb in bombs()] if args.readers else list(hostile_media())
    every = list(REPORTED) if args.rows else list(TOGETHER) if args.commands else every
    names = [name for name in every if (args.only in ("", name) if args.rows else args.only in name)]
    if not names:
        parser.error(f"--only {args.only}: expected {'' if args.rows else 'a part of '}one of {', '.join(every)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if args.readers:
            return 0 if hostile_readers.check_readers(folder, names) else 1
        if args.rows:
            return 0 if check_rows(folder, set(names)) else 1
        _make_elsewhere(names, folder)
        if args.commands:
            return 0 if check_commands(folder, names) else 1
        print("| file | bytes | read by | MB | seconds | outcome |\n|---|---|---|---|---|---|", flush=True)
        return 0 if all([check(folder / name) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
