"""What made a run, written into its folder: the resolved config, the command line, the commit, package versions."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cogvideo import __version__
from cogvideo.config import dump_yaml
from cogvideo.files import atomic_write, write_json

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece", "omegaconf")


def write_record(run_dir: Path, config: Any) -> None:
    """Write config.yaml and origin.json."""
    with atomic_write(run_dir / "config.yaml") as temporary:
        temporary.write_text(dump_yaml(config), encoding="utf-8")
    write_json(
        run_dir / "origin.json",
        {
            "command": sys.argv,
            "commit": _commit(),
            "python": platform.python_version(),
            "machine": platform.platform(),
            "packages": {"cogvideo": __version__} | {name: _version(name) for name in PACKAGES},
        },
    )


def _commit() -> str | None:
    """The commit of the source tree that runs, marked if it has changes; None for an installed package."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "-uno") else commit


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
