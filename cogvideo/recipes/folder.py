"""The folder of a recipe: its choices, its config files, which may be edited, and its steps, run in order.

recipe.json          what the recipe was started with
configs/NAME.yaml    config files of the steps; each is written once, before the step that first reads it
commands.sh          the steps as commands to run by hand
done/NAME            exists once step NAME is finished
report.html          the result
"""

import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cogvideo.config import read_yaml
from cogvideo.files import atomic_write, read_json, write_json
from cogvideo.hub import describe
from cogvideo.recipes.steps import CALIBRATION_STEPS, Step, check_trained, continuous_steps, run, schedule_for

PREVIEWS = 4
"""Sample sheets per training step."""


@dataclass(frozen=True)
class RecipeFolder:
    """The folder that a recipe writes everything into."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def config(self, name: str) -> Path:
        return self.path / "configs" / f"{name}.yaml"

    def done(self, name: str) -> Path:
        return self.path / "done" / name

    def step(
        self,
        name: str,
        words: Iterable[str | Path],
        *,
        processes: int = 1,
        prepare: Callable[[], None] | None = None,
    ) -> Step:
        """A step that is marked as done in this folder. Its command has names, not paths, for weights from the hub."""
        return Step(name, self.done(name), [describe(word) for word in words], processes, prepare)

    def begin(self, choices: dict[str, Any]) -> None:
        """Record what a new recipe is started with, or compare it with what the existing one was started with.

        Raises: ValueError if they differ; FileExistsError if the folder holds something else.
        """
        file = self.path / "recipe.json"
        if file.is_file():
            before = read_json(file, dict[str, Any])
            for key in sorted(before):  # older versions record fewer keys
                if before[key] != choices.get(key):
                    raise ValueError(
                        f"{self.path} was begun with {key}={before.get(key)}, got {choices.get(key)}; give the same, "
                        "or another --out"
                    )
            return
        if self.path.exists() and any(path.name != ".lock" for path in self.path.iterdir()):
            raise FileExistsError(f"{self.path} is not empty and no recipe was begun there; choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(file, choices)

    def write_config(self, name: str, comment: str, values: Mapping[str, Any]) -> Path:
        """Write a config file with a comment at its top, unless it exists: it may have been edited."""
        file = self.config(name)
        if not file.is_file():
            _write_yaml(file, "".join(f"# {line}\n" for line in comment.splitlines()), values)
        return file

    def set_schedule(self, name: str, schedule: Mapping[str, int]) -> None:
        """Set keys, such as train.steps, in a config file. Of its comments, only unindented lines are kept, at the top.

        In the tokenizer's config, tokenizer.continuous_steps is set too, unless it is there.
        """
        text = self.config(name).read_text(encoding="utf-8")
        comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        values = read_yaml(self.config(name))
        for key, value in schedule.items():
            group, _, field = key.partition(".")
            values[group] = self._group(name, values, group) | {field: value}
        if values.get("task") == "tokenizer":
            continuous = continuous_steps(schedule["train.steps"], taken=CALIBRATION_STEPS)
            values["tokenizer"] = {"continuous_steps": continuous} | self._group(name, values, "tokenizer")
        _write_yaml(self.config(name), comment, values)

    def has_schedule(self, name: str) -> bool:
        """Whether a config sets train.steps. Raises: ValueError if the file was edited and cannot be read."""
        return "steps" in self._group(name, read_yaml(self.config(name)), "train")

    def _group(self, name: str, values: Mapping[str, Any], group: str) -> dict[str, Any]:
        found = values.get(group) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{self.config(name)}: {group}={found!r}; expected `key: value` lines")
        return found

    def write_commands(self, steps: Sequence[Step]) -> None:
        """Write commands.sh, which stops at the first step that fails. When it is run again, training resumes."""
        lines = [
            "#!/bin/sh",
            "set -e",
            "# The steps, to run by hand. Config files appear in configs/ before the step that first reads them.",
            f"cd {shlex.quote(os.getcwd())} || exit",
            *(line for step in steps for line in ("", f"# {step.name}", step.shown)),
        ]
        with atomic_write(self.path / "commands.sh") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def run(
        self,
        steps: Sequence[Step],
        shares: Mapping[str, float],
        deadline: float | None,
        threads: int | None,
        environment: Mapping[str, str],
    ) -> None:
        """Run the steps that are not done.

        `shares`: the share of the time that each training step gets. `deadline`: by `time.monotonic`; training steps
        without a schedule get one that fills the time until then. Raises: StepError; ValueError for a training step
        that has no schedule if there is no deadline either.
        """
        for index, step in enumerate(steps):
            if step.is_done:
                continue
            if step.prepare is not None:
                step.prepare()
            if step.name in shares and not self.has_schedule(step.name):
                if deadline is None:
                    raise ValueError(
                        f"{self.config(step.name)} has no train.steps, and no time is given to make a schedule for; "
                        "write train.steps there, or give --minutes"
                    )
                left = sum(shares[later.name] for later in steps[index:] if later.name in shares)
                seconds = (deadline - time.monotonic()) * shares[step.name] / left
                schedule = schedule_for(step, self.path / step.name, seconds, threads, environment)
                schedule["log.preview_every"] = max(1, schedule["train.steps"] // PREVIEWS)
                self.set_schedule(step.name, schedule)
            run(step, threads, environment)
            if step.name in shares:
                check_trained(step, self.path / step.name)
            assert step.output is not None
            step.output.parent.mkdir(exist_ok=True)
            step.output.touch()


def _write_yaml(file: Path, comment: str, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        text = yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False)
        temporary.write_text(comment + text, encoding="utf-8")
