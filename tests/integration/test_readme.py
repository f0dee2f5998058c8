"""Commands of the README and the documentation: every one is parsed, and marked ones run at a small size.

A block under `<!-- run: NAME -->` is run; blocks of one NAME run in the order of the pages, in one folder. In every
other `bash` block each `cogvideo` command must parse, its config keys must be known, and named files must exist.
"""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from cogvideo.cli.main import main
from cogvideo.config import OVERRIDE, load_config
from cogvideo.data.prepare import PrepareConfig
from cogvideo.sampling.config import SampleAndUpsampleConfig, SampleConfig, UpsampleConfig
from cogvideo.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- run: (?P<run>\w+) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)
PYTHON_BLOCK = re.compile(r"```python\n(?P<text>.*?)```", re.DOTALL)
LAUNCHERS = {"torchrun", "deepspeed"}
CONFIGS = {
    "prepare": PrepareConfig,
    "check": PrepareConfig,
    "train": TrainConfig,
    "sample": SampleAndUpsampleConfig,
    "interpolate": SampleConfig,
    "eval": SampleConfig,
    "demo": SampleConfig,
    "upsample": UpsampleConfig,
}
SMALL = {
    "train": ["train.steps=2", "train.batch_size=4", "train.micro_batch_size=4", "log.every=1"],
    "tokenizer": ["train.steps=2", "train.batch_size=4", "tokenizer.continuous_steps=1", "tokenizer.num_codes=64"],
    "sample": ["rounds=1"],
    "eval": ["--num-prompts", "1"],
}


class Command(NamedTuple):
    page: str
    run: str | None
    words: tuple[str, ...]

    @property
    def cogvideo(self) -> list[str] | None:
        """The words after `cogvideo`, launchers and environment left out; None for other programs."""
        words = list(self.words)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["cogvideo"]:
            return words[1:]
        if words and words[0] in LAUNCHERS:
            return words[words.index("cogvideo") + 1 :]
        return None


def commands() -> list[Command]:
    """Every command of every `bash` block."""
    found = []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            for line in block["text"].replace("\\\n", " ").splitlines():
                for part in re.split(r" && |; ", line):
                    words = tuple(shlex.split(part, comments=True))
                    if words:
                        found.append(Command(str(page.relative_to(ROOT)), block["run"], words))
    return found


COMMANDS = commands()
SHOWN = list({command.words: command for command in COMMANDS if command.cogvideo is not None}.values())


def test_pages_show_commands() -> None:
    assert len(SHOWN) > 40
    assert {command.run for command in COMMANDS} >= {"own", "finetune", "sample", "debug"}


def test_no_line_is_longer_than_120_columns() -> None:
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            for line in block["text"].splitlines():
                assert len(line) <= 120, f"{page.name}: {line}"


@pytest.mark.parametrize("command", SHOWN, ids=lambda command: shlex.join(command.words)[:60])
def test_shown_command_parses(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command.cogvideo
    assert words
    if words[1:] in ([], ["--help"]):
        return
    name, *rest = words
    module = importlib.import_module(f"cogvideo.cli.{name}")
    parser = argparse.ArgumentParser(prog=name)
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(rest)
    files = getattr(args, "config", None) or []
    for file in files:
        assert Path(file).is_file(), file
    if name in CONFIGS:
        plain = getattr(args, "overrides", None) or getattr(args, "words", None) or getattr(args, "inputs", None) or []
        load_config(CONFIGS[name], files, [word for word in plain if OVERRIDE.fullmatch(word)])


def test_other_programs_name_files_that_exist() -> None:
    for command in COMMANDS:
        for word in command.words:
            if word.startswith(("scripts/", "configs/", "tests/")):
                assert (ROOT / word).exists(), f"{command.page}: {word}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for command in COMMANDS:
        if command.words[0] == "make":
            assert command.words[1] in targets, f"{command.page}: {command.words}"


def in_small(words: list[str]) -> list[str]:
    """The command with few steps and frames."""
    kind = "tokenizer" if any("tokenizer.yaml" in word for word in words) and words[0] == "train" else words[0]
    return words if "--self-test" in words else [*words, *SMALL.get(kind, [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({command.run for command in COMMANDS if command.run}))
def test_marked_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for link in ("configs", "cogvideo", "scripts"):
        (tmp_path / link).symlink_to(ROOT / link)
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> None:
        assert main(words) == 0, f"cogvideo {shlex.join(words)}"

    if name in ("own", "finetune"):
        run(["digits", "--out", "videos", "--count", "8", "--pixels", "80"])
    shown: list[list[str]] = []
    # A command that two pages show runs once: where the README has them in one block, that is the order.
    for command in COMMANDS:
        words = command.cogvideo
        if command.run == name and words and words not in shown:
            shown.append(words)
            run(in_small(words))
    assert shown


@pytest.mark.slow
def test_python_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the README and of the guide to the Python API."""
    monkeypatch.chdir(ROOT)
    blocks = {
        block["text"]
        for page in (ROOT / "README.md", ROOT / "docs/guides/python.md")
        for block in PYTHON_BLOCK.finditer(page.read_text(encoding="utf-8"))
    }
    assert blocks
    for block in blocks:
        exec(compile(block, "the documentation", "exec"), {"__name__": "__main__"})
