"""Run `cogvideo` commands in real processes, alone or in a group, that start in a fraction of a second.

They are forked from a server process that has imported torch and deepspeed, so a test can start and kill dozens.
"""

import multiprocessing
import os
import resource
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from cogvideo.config import dump_yaml
from cogvideo.training.config import TrainConfig

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.ranks_preload"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    words: list[str],
    world: int,
    folder: Path,
    environment: dict[str, str] | None = None,
    max_file_size: int | None = None,
) -> list[BaseProcess]:
    """Start `cogvideo WORDS` on every rank of a group; rank r's stderr goes to folder/stderr_r.txt.

    No file grows beyond `max_file_size` bytes, as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        settings = group | own | {"OMP_NUM_THREADS": "1"} | (environment or {})
        arguments = (words, settings, folder / f"stderr_{rank}.txt", max_file_size)
        process = _context.Process(target=_work, args=arguments)
        process.start()
        processes.append(process)
    return processes


def train_words(config: TrainConfig, *more: str) -> list[str]:
    """The command that trains with `config`; its file is written beside the run folder."""
    file = config.run_dir.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_yaml(config), encoding="utf-8")
    return ["train", "--config", str(file), *more]


def finish(processes: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Exit codes by rank; None for a process that was killed because it ran longer than `seconds`."""
    deadline = time.monotonic() + seconds
    codes = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def run(words: list[str], world: int, folder: Path, **options: dict[str, str]) -> None:
    """Run a command, which must succeed on every rank."""
    codes = finish(start(words, world, folder, **options))
    assert codes == [0] * world, [path.read_text(encoding="utf-8")[-2000:] for path in folder.glob("stderr_*.txt")]


def _work(words: list[str], environment: dict[str, str], stderr: Path, max_file_size: int | None) -> None:
    os.environ.update(environment)
    if max_file_size is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # stdout may be a large file
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from cogvideo.cli.main import main

    code = main(words)
    sys.stderr.flush()
    # as at the interpreter's exit, which multiprocessing skips: destroys process groups
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)
