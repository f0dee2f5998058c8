"""A folder being filled with clips, by one process or many, that can be stopped at any time and gone on with.

While the work lasts the folder holds `unfinished/`:

work.json                            what is being made; going on with something else is refused
000000-round-2-000128.safetensors    a batch of tokens, as soon as it is drawn: of the group of clips that begins with
                                     clip 0, in round 2 of interpolation, from the batch's clip 128 on
000000.safetensors                   a whole group of clips, once its videos are written; its batches are gone then

Every file is written by one process only, and appears whole or not at all.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cogvideo.distributed import ProcessGroup
from cogvideo.files import atomic_write, read_json, write_json
from cogvideo.sampling.kept import Keep
from cogvideo.sampling.outputs import claim_folder

UNFINISHED, RECORD, RESULT = "unfinished", "work.json", "samples.json"
LEFT_OVER = re.compile(r"\..*\.[a-z0-9_]{8}\.tmp(\.\w+)?")
"""What a killed `files.atomic_write` leaves."""


class Work:
    def __init__(self, out: Path, identity: dict[str, Any], processes: ProcessGroup) -> None:
        """`identity`: all that decides the result, for JSON, by names that a user understands."""
        self.out, self.folder, self.processes = out, out / UNFINISHED, processes
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it reads back
        self.batches_made = 0
        """By this process, in this run."""

    @property
    def digest(self) -> str:
        """Of the identity; results carry it, so that a finished folder is known again."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def begin(self, *, overwrite: bool = False, resume: bool = False) -> bool:
        """Take the folder; False if all is finished. To be called by all processes.

        With `resume` a folder that is not there yet or is empty is taken as well.
        Raises: FileExistsError, ValueError, OSError for a folder that holds anything else, before a change to it.
        """
        return self.processes.broadcast_from_rank_0(lambda: self._claim(overwrite, resume))

    def _claim(self, overwrite: bool, resume: bool) -> bool:
        record = {"work": self.identity, "processes": self.processes.size}
        if resume and (self.folder / RECORD).is_file():
            self._check_same(read_json(self.folder / RECORD), record)
            for path in [*self.out.iterdir(), *self.folder.iterdir()]:
                if LEFT_OVER.fullmatch(path.name):
                    path.unlink()
            return True
        if resume and (self.out / RESULT).is_file():
            if read_json(self.out / RESULT).get("made_from") != self.digest:
                raise ValueError(f"{self.out} holds other finished clips; give the same prompts and settings")
            return False
        if resume and self.out.is_dir() and any(not LEFT_OVER.fullmatch(path.name) for path in self.out.rglob("*")):
            if any(path.name != UNFINISHED for path in self.out.iterdir()):
                raise FileExistsError(f"{self.out} holds no run to go on with; choose another folder")
        elif self.folder.is_dir() and not overwrite:
            raise FileExistsError(f"{self.out} holds an unfinished run; --resume goes on, --overwrite begins anew")
        else:
            claim_folder(self.out, overwrite)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        write_json(self.folder / RECORD, record)
        return True

    def _check_same(self, found: Any, record: dict[str, Any]) -> None:
        """Raises: ValueError that names what differs."""
        theirs = found.get("work") if isinstance(found, dict) else None
        if not isinstance(theirs, dict):
            raise ValueError(f"{self.folder / RECORD} is damaged; remove {self.folder} to begin anew")
        if theirs.keys() != self.identity.keys():
            raise ValueError(f"{self.out} was begun by another command; give the same")
        for name, ours in self.identity.items():
            if theirs[name] != ours:
                raise ValueError(f"{self.out} was begun with {_difference(name, theirs[name], ours)}; give the same")
        if found.get("processes") != self.processes.size:
            raise ValueError(
                f"{self.out} was begun by {found.get('processes')} processes, not {self.processes.size}; start as many"
            )

    def keep(self, group: int) -> Keep:
        """Keeps the batches of the group of clips that begins with clip `group`."""

        def keep(name: str, make: Callable[[], Tensor]) -> Tensor:
            path = self.folder / f"{group:06d}-{name}.safetensors"
            if path.is_file():
                return _load(path)["tokens"]
            tokens = make()
            _save(path, tokens=tokens)
            self.batches_made += 1
            return tokens

        return keep

    def is_done(self, group: int) -> bool:
        return self._whole(group).is_file()

    def finish(self, group: int, clips: list[int], tokens: Tensor) -> None:
        """A group's videos are written: keep its tokens (clips, frames, frame_len) for `gather`."""
        _save(self._whole(group), tokens=tokens, clips=torch.tensor(clips))
        for path in self.folder.glob(f"{group:06d}-*.safetensors"):
            path.unlink()

    def gather(self, num_clips: int) -> Tensor:
        """The tokens of all groups of all processes, in order: (num_clips, frames, frame_len)."""
        files = [path for path in self.folder.glob("*.safetensors") if path.stem.isdecimal()]
        groups = [_load(path) for path in files]
        tokens, clips = (torch.cat([group[name] for group in groups]) for name in ("tokens", "clips"))
        order = clips.argsort()
        if not torch.equal(clips[order], torch.arange(num_clips)):
            raise ValueError(f"{self.folder} does not hold every clip once; remove {self.out} and begin anew")
        return tokens[order]

    def end(self) -> None:
        """All results are written: nothing is left to go on with."""
        (self.folder / RECORD).unlink(missing_ok=True)  # first: without it nothing can seem unfinished
        shutil.rmtree(self.folder)

    def _whole(self, group: int) -> Path:
        return self.folder / f"{group:06d}.safetensors"


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """In words: what was there first and what is there now."""
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return f"other {name}"
    for key in ours:
        if theirs.get(key) != ours[key]:
            if isinstance(ours[key], Mapping):
                return _difference(f"{name}: {key}", theirs.get(key), ours[key])
            return f"other {name}: {key}={theirs.get(key)}, not {ours[key]}"
    return f"other {name}"


def _save(path: Path, **tensors: Tensor) -> None:
    with atomic_write(path) as part:
        # not save_file, which lets nobody else read the file
        part.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); remove it to draw it again") from None
