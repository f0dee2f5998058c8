"""Adapters that visitors can choose from: jobs with the same set run together, different sets one after another.

Adapters apply to a whole pipeline and must not change while threads sample with it.
"""

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from cogvideo.hub import describe
from cogvideo.sampling.adapters import AdapterChoice
from cogvideo.sampling.pipeline import Pipeline

USUAL_NAMES = ("adapter", "export", "bundle")
"""Folder names that identify nothing: a run's adapter is in RUN/export/adapter, a recipe's weights in DIR/bundle."""


def short_name(folder: Path) -> str:
    """A name for visitors that does not reveal where a folder is."""
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    place = describe(folder)
    if place != str(folder):
        place = place.rpartition("@")[0]  # from the hub: without the commit
    return ([part for part in Path(place).parts if part not in USUAL_NAMES] or [folder.name])[-1]


def name_adapters(choices: Iterable[AdapterChoice]) -> dict[str, AdapterChoice]:
    """The adapters by short names: `mine`, or `mine (0.5)` with a scale."""
    named: dict[str, AdapterChoice] = {}
    for choice in choices:
        short = short_name(choice.folder)
        scale = "" if choice.scale == 1 else f" ({choice.scale:g})"
        name, number = f"{short}{scale}", 2
        while name in named:
            name, number = f"{short}-{number}{scale}", number + 1
        named[name] = choice
    return named


class Turn:
    """A job's turn to run with its adapters. Set `left` when there is nothing more to start."""

    def __init__(self, switch: "AdapterSwitch", names: tuple[str, ...]) -> None:
        self.names = names
        self.thread: threading.Thread | None = None
        """The thread that runs the job, once it has started; adapters do not change until it ends."""
        self.admitted = self.left = False
        self._switch = switch

    @property
    def is_open(self) -> bool:
        """Whether its job waits or runs."""
        return not self.left if self.thread is None else self.thread.is_alive()

    def has_come(self) -> bool:
        """Whether its adapters are in effect; switches to them if no other job prevents it.

        Raises: ValueError or torch.OutOfMemoryError if weights cannot be merged.
        """
        return self._switch.admit(self)


class AdapterSwitch:
    """Switches a pipeline's adapters, first come, first served, so that a popular set cannot block others forever."""

    def __init__(self, pipeline: Pipeline, adapters: dict[str, AdapterChoice]) -> None:
        """Read the adapters. Raises: FileNotFoundError, ValueError for one that is damaged or does not fit."""
        for name, choice in adapters.items():
            pipeline.add_adapter(name, choice.folder)
        self._pipeline, self._adapters = pipeline, adapters
        self._lock = threading.Lock()
        self._turns: list[Turn] = []
        self._in_effect: tuple[str, ...] = ()

    def enter(self, names: Sequence[str] | None) -> Turn:
        """Queue for a set of adapters; None: all of them. Raises: ValueError for an unknown name."""
        for name in names or ():
            if name not in self._adapters:
                raise ValueError(f"there is no adapter {name[:40]!r}; available: {', '.join(self._adapters) or 'none'}")
        turn = Turn(self, tuple(name for name in self._adapters if names is None or name in names))
        with self._lock:
            self._turns.append(turn)
        return turn

    def admit(self, turn: Turn) -> bool:
        """See `Turn.has_come`."""
        with self._lock:
            self._turns = [other for other in self._turns if other.is_open]
            if turn.admitted:
                return True
            before = self._turns[: self._turns.index(turn)]
            if any(not other.admitted and other.names != turn.names for other in before):
                return False
            if turn.names != self._in_effect:
                if any(other.admitted for other in self._turns):
                    return False
                self._in_effect = ()  # if switching fails, none are in effect
                self._pipeline.set_adapters({name: self._adapters[name].scale for name in turn.names})
                self._in_effect = turn.names
            turn.admitted = True
            return True
