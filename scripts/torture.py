"""Try every command under every fault: kills, a full disk, failing reads and writes, limits, clocks that jump.

    python scripts/torture.py --out DIR [--command NAME ...] [--fault NAME ...] [--kills 100] [--seed 0]

A trial runs one command on tiny inputs, with one fault at some moment, and then, if it failed, the same command again
(with --resume where there is such an option). It passes if

- the final files are byte for byte those of an undisturbed run, except for what depends on the clock (`NOT_COMPARED`,
  and `WALL_CLOCK` in metrics.jsonl), and older checkpoints where a training run reported that it skipped one or was
  stopped;
- a failure that the process could detect had exit code 2 and a message of one line, without a traceback;
- no other file, lock or process is left; after a SIGKILL, once the command has run again.

Moments are spread evenly over a run. Two fifths of the kills come at a point in time, two fifths before a call that
changes a file, and one fifth before one of the last 5 % of those calls. `--kills` is the number of trials of SIGKILL
and of SIGTERM for each command; other faults get a fifth as many, new processes a tenth. Commands that start several
processes get a tenth of all these. Each trial's outcome is kept in DIR/cells; the same command line, or one with more
kills, continues after the last. The source tree must not change meanwhile, as commands start processes from it.
DIR/table.md has passed/tried per cell, DIR/table.json also how to repeat what failed, DIR/failed the folders of failed
trials. Needs Linux and gcc.

Commands are forked from a process that has already imported what they need; their system calls go through faults.c.
`new-process` is not a fault but the real command line, `python -m cogvideo`: it must write the same files (even seeds),
or gets a SIGTERM while it imports (odd seeds). `push` writes to a stand-in hub (torture_hub.py): it is killed before
the hub answers a request that changes something, and the disk that is full, fails, is slow or read-only is the hub's.
"""

import argparse
import atexit
import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from torture_commands import COMMANDS, Command, contents, make_scene, warm_up  # noqa: E402
from torture_hub import KILLS, hub  # noqa: E402

from cogvideo.files import write_json  # noqa: E402
from tests.helpers.ranks import free_port  # noqa: E402

KINDS = WRITES, READS, REMOVALS = 1, 2, 4
"""Kinds of system calls, numbered as in faults.c."""
SECONDS = 240
"""Time limit of a command, beyond which it counts as hung and fails the trial."""
IMPORT_SECONDS = 6
"""Approximate time of a new process's imports."""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of pyarrow, which pandas imports
}
"""Environment that keeps libraries from starting threads: only the forking thread exists in the fork."""
NOISE = re.compile(r"Traceback|Exception ignored|terminate called|Fatal Python error|Segmentation fault")
ERROR = re.compile(r"^(\[rank \d+\] )?cogvideo: error: ", re.MULTILINE)
OTHER_STEPS = re.compile(r"^(error: step \d+ could not be saved: .* trying again|warning: stopped at step)", re.M)
"""Messages of a training run that skipped a checkpoint, or wrote an extra one when it was stopped."""
TEMPORARY = re.compile(r"\.tmp\b|lock$")


class Failed(Exception):
    """A trial that did not pass; the message says why."""


@dataclass
class Moment:
    """A trial's seed and folders, and measurements of an undisturbed run, from which a fault draws its moment."""

    seed: int
    seconds: float
    """Duration of an undisturbed run."""
    calls: dict[int, int]
    """Number of calls of each kind in that run."""
    shim: ctypes.CDLL
    work: Path
    scene: Path

    @property
    def share(self) -> float:
        """Fraction of the run before the fault; consecutive seeds spread it evenly."""
        return (0.5 + self.seed * 0.6180339887498949) % 1

    def nth_call(self, kinds: int, share: float) -> int:
        """The number, from 1, of the call that a fraction `share` of all calls of these kinds precedes."""
        return 1 + int(share * sum(count for kind, count in self.calls.items() if kind & kinds))

    def arm_shim(
        self, kinds: int, first: int = 0, lasting: bool = False, error: int = 0, microseconds: int = 0
    ) -> None:
        """Count this process's calls of `kinds` from now on, and make them fail or take up to `microseconds` longer.

        A negative `error` is a signal that is sent before the call.
        """
        places = os.fsencode(self.work / "cwd"), os.fsencode(self.scene)
        self.shim.faults_arm(*places, kinds, first, lasting, error, microseconds)


Arm = Callable[[Moment], Callable[[], None]]
"""Draws a fault's moment; returns what a process must call before the command."""


def failing(number: int, *, lasting: bool = False, kinds: int = WRITES) -> Arm:
    """The n-th call fails, or all from the n-th on."""

    def arm(moment: Moment) -> Callable[[], None]:
        first = moment.nth_call(kinds, moment.share)
        return lambda: moment.arm_shim(kinds, first, lasting, number)

    return arm


def slow(moment: Moment) -> Callable[[], None]:
    microseconds = min(100_000, int(2 * 10e6 / max(1, moment.calls[WRITES])))  # ten seconds in all
    return lambda: moment.arm_shim(WRITES, microseconds=microseconds)


def jumping(moment: Moment) -> Callable[[], None]:
    return lambda: moment.shim.faults_jump(moment.seed)


def little_memory(moment: Moment) -> Callable[[], None]:
    more = int(moment.share * (256 << 20))

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)

    return limit


def few_files(moment: Moment) -> Callable[[], None]:
    more = int(moment.share * 16)

    def limit() -> None:
        most = max(int(name) for name in os.listdir("/proc/self/fd")) + 1 + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    return limit


def killed(number: int) -> Arm:
    """A signal before a call that changes a file; kills at a point in time are sent by `Torture` instead."""

    def arm(moment: Moment) -> Callable[[], None]:
        if is_timed(moment.seed):
            return lambda: None
        share = 0.95 + moment.share / 20 if moment.seed % 5 == 4 else moment.share
        return lambda: moment.arm_shim(WRITES | REMOVALS, moment.nth_call(WRITES | REMOVALS, share), error=-number)

    return arm


def is_timed(seed: int) -> bool:
    """Whether a kill comes at a point in time, not before a call."""
    return seed % 2 == 0 and seed % 5 != 4


def in_new_process(moment: Moment) -> Callable[[], None]:
    def execute() -> None:
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        os.execve(sys.executable, [sys.executable, "-m", "cogvideo", *sys.argv[1:]], environment)

    return execute


FAULTS: dict[str, Arm] = {
    "sigkill": killed(signal.SIGKILL),
    "sigterm": killed(signal.SIGTERM),
    "full-disk": failing(errno.ENOSPC, lasting=True),
    "write-error": failing(errno.EIO),
    "read-error": failing(errno.EIO, kinds=READS),
    "read-only": failing(errno.EROFS, lasting=True, kinds=WRITES | REMOVALS),
    "memory": little_memory,
    "open-files": few_files,
    "two-at-once": lambda moment: lambda: None,
    "clock-jumps": jumping,
    "slow-disk": slow,
    "new-process": in_new_process,
}
UNNOTICED = ("clock-jumps", "slow-disk")
"""Faults that must not end a command."""
LEAVES_FILES = ("sigkill", "read-only")
"""Faults after which a process cannot remove its temporary files."""


class Group:
    """The processes of a command, one per rank, forked from this one."""

    def __init__(self, command: Command, words: list[str], work: Path, name: str, arm: Callable[[], None]) -> None:
        self.errors = [work / f"{name}_{rank}.txt" for rank in range(command.world)]
        self.codes: dict[int, int] = {}
        group = {"WORLD_SIZE": str(command.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        (work / "cwd").mkdir(parents=True, exist_ok=True)
        (work / "tmp").mkdir(exist_ok=True)
        for path in self.errors:
            path.touch()  # a process may be killed before it opens its file
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError("a thread was started before the fork; its locks would never be freed")
        self.pids = []
        for rank in range(command.world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | group if command.world > 1 else {}
            pid = os.fork()
            if pid == 0:
                _run_in_fork(words, own | {"TMPDIR": str(work / "tmp")}, work, self.errors[rank], arm)
            self.pids.append(pid)

    def poll(self) -> bool:
        """Whether any process still runs."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def send(self, number: int) -> None:
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def wait(self, seconds: float = SECONDS) -> None:
        """Raises: Failed if it takes longer."""
        deadline = time.monotonic() + seconds
        while self.poll():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                while self.poll():
                    time.sleep(0.01)
                raise Failed(f"did not end within {seconds:.0f} s")
            time.sleep(0.003)

    @property
    def succeeded(self) -> bool:
        return not any(self.codes.values())

    def text(self) -> str:
        return "".join(path.read_text("utf-8", "replace") for path in self.errors)

    def check_messages(self, allowed: tuple[int, ...] = (0, 2)) -> None:
        """Raises: Failed for a traceback, another exit code, or anything but one line per failed process."""
        if noise := NOISE.search(text := self.text()):
            raise Failed(f"{noise[0]}: {text.strip().splitlines()[-1][:300]}")
        codes = list(self.codes.values())
        if not set(codes) <= set(allowed):
            raise Failed(f"ended with {codes}: {' / '.join(text.strip().splitlines()[-2:])[:300]}")
        for path, code in zip(self.errors, (self.codes[pid] for pid in self.pids), strict=True):
            lines = len(ERROR.findall(path.read_text("utf-8", "replace")))
            if code == 2 and (lines > 1 or (lines == 0 and len(self.pids) == 1)):
                raise Failed(f"{lines} lines of error for exit code 2")
        if 2 in codes and not ERROR.search(text):
            raise Failed("exit code 2 without a line")

    def check_no_process_left(self) -> None:
        """Kill any process left in the command's sessions. Raises: Failed if there was one."""
        deadline = time.monotonic() + 10
        while left := [pid for pid, session in _sessions() if session in self.pids]:
            if time.monotonic() > deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise Failed("left a process behind")
            time.sleep(0.01)


def _sessions() -> list[tuple[int, int]]:
    """Process and session ids of all processes that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found.append((int(path.parent.name), int(fields[3])))
    return found


def _run_in_fork(words: list[str], environment: dict[str, str], work: Path, errors: Path, arm: Callable[[], None]):
    """Run the command as a new process would; does not return."""
    code = 1
    try:
        os.setsid()
        os.chdir(work / "cwd")
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["cogvideo", *words]
        from cogvideo.cli.main import main

        arm()
        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:  # as at the interpreter's exit
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stderr.flush()
        finally:
            os._exit(code & 255)


class Torture:
    """The matrix of commands and faults, with its folder."""

    def __init__(self, out: Path, kills: int, seed: int, shim: ctypes.CDLL) -> None:
        self.out, self.kills, self.seed, self.shim = out, kills, seed, shim
        self.scene = out / "scene"
        self._references: dict[str, tuple[Moment, dict[str, bytes]]] = {}

    def make_scene(self) -> None:
        if not self.scene.is_dir():
            building = self.out / "scene.building"
            shutil.rmtree(building, ignore_errors=True)
            if (pid := os.fork()) == 0:
                try:
                    make_scene(building)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            if os.waitpid(pid, 0)[1]:
                sys.exit("torture: the inputs of the commands could not be made")
            building.rename(self.scene)

    def words(self, command: Command, again: bool = False) -> list[str]:
        return [
            *shlex.split(command.words.format(scene=self.scene)),
            *([command.again] if again and command.again else []),
        ]

    def reference(self, name: str) -> tuple[Moment, dict[str, bytes]]:
        """An undisturbed run: a `Moment` with its duration and numbers of calls, and the files that it writes."""
        if name not in self._references:
            command, work = COMMANDS[name], self.out / "references" / name
            shutil.rmtree(work, ignore_errors=True)
            moment = Moment(0, 0.0, {}, self.shim, work, self.scene)

            def write_counts(pid: int) -> None:
                counts = [self.shim.faults_count(kind) for kind in KINDS]
                (work / f"counts_{pid}").write_text(json.dumps(counts))

            def arm() -> None:
                moment.arm_shim(sum(KINDS))
                atexit.register(write_counts, os.getpid())

            started = time.monotonic()
            with hub(work) if command.pushes else contextlib.nullcontext():
                group = Group(command, self.words(command), work, "stderr", arm)
                group.wait()
                moment.seconds = time.monotonic() - started
            if not group.succeeded:
                sys.exit(f"torture: {name} fails without a fault:\n{group.text()}")
            counts = [json.loads(path.read_text()) for path in work.glob("counts_*")]
            moment.calls = dict(zip(KINDS, map(max, zip(*counts, strict=True)), strict=True))
            writes, reads, removals = moment.calls.values()
            print(f"{name}: {moment.seconds:.1f} s, {writes} writes, {reads} reads, {removals} removals", flush=True)
            self._references[name] = moment, contents(work / "cwd")
        return self._references[name]

    def cell(self, name: str, fault: str) -> dict[str, Any]:
        """Run those trials of a command under a fault that earlier runs have not; returns the outcome of all."""
        shares = dict.fromkeys(KILLS, 1) | {"new-process": 10}
        share = shares.get(fault, 5)
        trials = max(1, self.kills // share // (10 if COMMANDS[name].world > 1 else 1))
        file = self.out / "cells" / f"{name}--{fault}.json"
        cell: dict[str, Any] = {"command": name, "fault": fault, "seed": self.seed, "trials": 0}
        cell |= {"passed": 0, "ended_by_fault": 0, "seconds": 0.0, "failures": []}
        if file.is_file() and (found := json.loads(file.read_text()))["seed"] == self.seed:
            cell = found
        if cell["trials"] >= trials:
            return cell
        self.reference(name)
        for seed in range(self.seed + cell["trials"], self.seed + trials):
            started = time.monotonic()
            work = self.out / "trials" / f"{name}--{fault}--{seed}"
            shutil.rmtree(work, ignore_errors=True)
            try:
                cell["ended_by_fault"] += self.trial(name, fault, seed, work)
                cell["passed"] += 1
            except Failed as failure:
                words = f"--out {self.out / 'repeat'} --command {name} --fault {fault} --kills 1 --seed {seed}"
                repeat = f"python scripts/torture.py {words}"
                cell["failures"].append({"seed": seed, "reason": str(failure), "repeat": repeat})
                print(f"  {name} {fault} seed {seed}: {failure}", flush=True)
                kept = self.out / "failed" / work.name
                shutil.rmtree(kept, ignore_errors=True)
                kept.parent.mkdir(exist_ok=True)
                work.rename(kept)
            else:
                shutil.rmtree(work)
            cell["trials"] += 1
            cell["seconds"] = round(cell["seconds"] + time.monotonic() - started, 1)
            write_json(file, cell)
        print(f"{name} {fault}: {cell['passed']}/{trials} passed, {cell['ended_by_fault']} ended by it", flush=True)
        return cell

    def trial(self, name: str, fault: str, seed: int, work: Path) -> bool:
        """Run a command under a fault, and again if it failed; returns whether the fault ended it. Raises: Failed."""
        plain, expected = self.reference(name)
        moment = replace(plain, seed=seed, work=work)
        if COMMANDS[name].pushes:
            first = 0 if fault in KILLS and is_timed(seed) else moment.nth_call(WRITES, moment.share)
            with hub(work, fault, first, is_handled=seed % 3 == 0):
                ended = self._run_and_repeat(name, fault, moment)
        else:
            ended = self._run_and_repeat(name, fault, moment)
        found = contents(work / "cwd")
        if OTHER_STEPS.search((work / "stderr_0.txt").read_text("utf-8", "replace")):
            found, expected = without_older_checkpoints(found), without_older_checkpoints(expected)
        compare(found, expected)
        return ended

    def _run_and_repeat(self, name: str, fault: str, moment: Moment) -> bool:
        """A trial without the comparison of files."""
        command, work, seed = COMMANDS[name], moment.work, moment.seed
        _, expected = self.reference(name)
        first = Group(command, self.words(command), work, "stderr", FAULTS[fault](moment))
        groups, allowed = [first], (0, 2)
        if fault in KILLS or (fault == "new-process" and seed % 2):
            number = signal.SIGKILL if fault == "sigkill" else signal.SIGTERM
            allowed = (0, -number, 128 + number) if number == signal.SIGTERM else (0, -number)
            until = time.monotonic() + moment.share * (IMPORT_SECONDS if fault == "new-process" else moment.seconds)
            timed = fault == "new-process" or is_timed(seed)
            while first.poll() and not first.codes and not (timed and time.monotonic() > until):
                if (work / "waiting").exists():  # the hub holds a request back for the kill
                    break
                time.sleep(0.001)
            first.send(number)
        elif fault == "two-at-once":
            time.sleep(moment.share * moment.seconds)
            groups.append(Group(command, self.words(command), work, "second", lambda: None))
        for group in groups:
            group.wait()
        for group in groups:
            group.check_messages(allowed)
            group.check_no_process_left()
        if (fault in UNNOTICED or (fault == "new-process" and seed % 2 == 0)) and not first.succeeded:
            raise Failed(f"ended by {fault}")
        if not any(group.succeeded for group in groups) and fault == "two-at-once":
            raise Failed("both commands failed")
        if fault not in LEAVES_FILES:
            check_nothing_left(work)
        if any(group.succeeded for group in groups):
            return not first.succeeded
        left = contents(work / "cwd")
        done = {name: data for name, data in left.items() if not TEMPORARY.search(name)} == expected
        (work / "healthy").touch()  # ends the hub's faults
        second = Group(command, self.words(command, again=True), work, "again", lambda: None)
        second.wait()
        second.check_messages()
        second.check_no_process_left()
        if not second.succeeded and not done:  # a command may refuse to replace a finished result
            raise Failed(f"cannot be run again: {second.text().strip()[-300:]}")
        shutil.rmtree(work / "tmp")  # of the killed process
        check_nothing_left(work)
        return True


def check_nothing_left(work: Path) -> None:
    """Raises: Failed for temporary files and locks."""
    left = [path for path in (work / "cwd").rglob("*") if TEMPORARY.search(path.name)]
    left += [*(work / "tmp").glob("*")]
    if left:
        raise Failed(f"left {', '.join(str(path.relative_to(work)) for path in left[:3])}")


def compare(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Raises: Failed, naming the first file that differs."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            raise Failed(f"{name} is {'missing' if name not in found else 'left over'}")
        if found[name] != expected[name]:
            raise Failed(f"{name} differs from that of an undisturbed run")


def without_older_checkpoints(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, with only the last checkpoint."""
    steps = {path.parts[2] for path in map(PurePath, files) if path.parts[:2] == ("run", "checkpoints")}
    older = tuple(f"run/checkpoints/{step}/" for step in sorted(step for step in steps if step[:5] == "step_")[:-1])
    return {name: data for name, data in files.items() if not name.startswith(older)}


def table(cells: list[dict[str, Any]]) -> str:
    """Passed/tried, a row for each command, and the totals."""
    found = {(cell["command"], cell["fault"]): f"{cell['passed']}/{cell['trials']}" for cell in cells}
    faults = [fault for fault in FAULTS if any(fault == tried for _, tried in found)]
    lines = [f"| | {' | '.join(faults)} |", f"|---|{'---:|' * len(faults)}"]
    for name in COMMANDS:
        if any(name == tried for tried, _ in found):
            lines.append(f"| {name} | {' | '.join(found.get((name, fault), '') for fault in faults)} |")
    tried, passed, ended = (sum(cell[key] for cell in cells) for key in ("trials", "passed", "ended_by_fault"))
    by_kills = sum(cell["trials"] for cell in cells if cell["fault"] in KILLS)
    total = f"{passed} of {tried} trials passed; {by_kills} were kills. In {ended} the fault ended a command."
    return "\n".join([*lines, "", total, ""])


def build_shim(out: Path) -> Path:
    """Compile faults.c. Raises: SystemExit without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        sys.exit("torture: needs a C compiler, for the faults of files and clocks; install gcc")
    shim = out / "faults.so"
    source = ROOT / "scripts/faults.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    return shim


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for trials and results")
    parser.add_argument("--command", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), metavar="NAME")
    parser.add_argument("--fault", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="NAME")
    parser.add_argument("--kills", type=int, default=100, help="trials per cell of kills; other faults get a fifth")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial in each cell")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
        os.environ["LD_PRELOAD"] = str(build_shim(out))  # for the restarted process and its forks
        os.environ |= ONE_THREAD
        os.execv(sys.executable, [sys.executable, *sys.argv])
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    numbers = (ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_uint)
    shim.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, *numbers]
    shim.faults_count.restype = ctypes.c_long
    warm_up()
    torture = Torture(out, args.kills, args.seed, shim)
    torture.make_scene()
    cells = []
    for fault in args.fault:
        for name in args.command:
            cells.append(torture.cell(name, fault))
            everything = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
            (out / "table.md").write_text(table(everything), encoding="utf-8")
            write_json(out / "table.json", everything)
    print(table(cells), end="")
    return 0 if all(cell["passed"] == cell["trials"] for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
