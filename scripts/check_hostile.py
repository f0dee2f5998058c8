"""Read small media files that claim or unpack to gigabytes, and print what reading them takes.

    python scripts/check_hostile.py [--only NAME] [--keep DIR]     # each file, as a command and as the page reads it
    python scripts/check_hostile.py --commands                     # prepare, --first-frame and --continue, all at once

`tests/helpers/hostile.py` makes the files. Memory is the peak of the process that runs FFmpeg, and with `--commands`
that of the command and its children together; time is processor time. The exit code is 1 if a command ends in a
traceback, or if a file takes more than MAX_MB or MAX_SECONDS, unless its picture is that large (LARGE).
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cogvideo.media import sandbox
from cogvideo.media.decoder import Limits
from cogvideo.media.video import LIMITS, UNTRUSTED, probe_video, read_video, write_video
from tests.helpers.hostile import hostile_media

MAX_MB, MAX_SECONDS = 330, 10
LARGE = ("canvas.", "large.png", "grows-", "frames.gif", "scans.jpg")
"""Pictures of up to 134 million pixels, which commands read; the page refuses them."""
TOGETHER = ("samples.mp4", "fragment.mp4", "tracks.mp4", "many-edits.mp4", "grows-mjpeg.mkv")
TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """The peak memory in MB, and processor time, of the processes below one."""

    def __init__(self, chosen: Callable[[str], bool], root: int):
        """`chosen`: by its command line, whether a process counts."""
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
    """A process and all below it."""
    found = [root]
    for pid in found:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def read(path: Path, limits: Limits) -> str:
    """Read a file as its first frame and its last; says how that ended."""
    try:
        info = probe_video(path, limits=limits)
        ends = info.seconds[[0, -1]] if len(info.seconds) > 1 else info.seconds
        read_video(path, side=16, only=ends, limits=limits)
    except ValueError as error:
        return "refused: " + str(error).replace(str(path), path.name)[:90]
    return f"{len(info.seconds)} frames of {info.width}x{info.height}"


def check(path: Path) -> bool:
    """Read a file with the limits of commands and of the page, and print a row; whether both took little."""
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


def check_commands(folder: Path) -> bool:
    """Give each file to three commands at once; print the peak memory of each beside that of a sound file."""
    import numpy as np

    write_video(folder / "sound.mp4", np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8), 4)
    ok = True
    print("| file | prepare | --first-frame | --continue |\n|---|---|---|---|", flush=True)
    for name in ("sound.mp4", *TOGETHER):
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


def make(names: list[str], folder: Path) -> None:
    files = hostile_media()
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_bytes(files[name]())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files with this in their names")
    parser.add_argument("--keep", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--commands", action="store_true", help="whole commands, three at once")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in (TOGETHER if args.commands else hostile_media()) if args.only in name]
        # in a process of its own: a new process counts the memory of the one that starts it
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(names, folder))
        maker.start()
        maker.join()
        if args.commands:
            return 0 if check_commands(folder) else 1
        print("| file | bytes | read by | MB | seconds | outcome |\n|---|---|---|---|---|---|", flush=True)
        return 0 if all([check(folder / name) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
