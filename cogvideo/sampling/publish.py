"""Publishing weights: which files of a folder belong to them, and the model card, the README.md of a hub repository.

A folder is a bundle, a checkpoint, an adapter or an image tokenizer. It is only read. The card reports what was
recorded in training: in the run folder that contains an export, or in those beside a bundle that a recipe made.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cogvideo import __version__
from cogvideo.checkpoint.adapter import BASE, SETTINGS, load_adapter
from cogvideo.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from cogvideo.checkpoint.format import CONFIG, INDEX, MANIFEST, SHARD_NAME, Manifest, load_checkpoint
from cogvideo.checkpoint.format import WEIGHTS as CHECKPOINT_WEIGHTS
from cogvideo.checkpoint.load import check_fits, stored_config
from cogvideo.config import read_yaml, to_dict
from cogvideo.files import checked, is_temporary, parse_json, read_json
from cogvideo.hub import describe, upload
from cogvideo.locks import LOCK_NAME
from cogvideo.logs import get_logger
from cogvideo.sampling.bundle import (
    HASHED_FILES,
    MODELS,
    SETTINGS_FILE,
    SUPERRES,
    open_high_res_tokenizer,
    open_tokenizers,
    read_config,
)
from cogvideo.tokenizers.image import ImageTokenizer

log = get_logger(__name__)

CARD = "README.md"
SHEET_SUFFIX = ".png"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
MAX_CARD_BYTES = 1 << 20
SHOWN_METRICS = re.compile(r"(validation/)?(loss(/.*)?|psnr|perplexity|(appearance|motion)_distance(_floor)?)")
USES = {
    "bundle": 'cogvideo sample "PROMPT" --model {repo} --out samples',
    "checkpoint": "cogvideo train --config FILE init.checkpoint={repo}",
    "adapter": 'cogvideo sample "PROMPT" --adapter {repo} --out samples',
    "image tokenizer": "cogvideo prepare --captions FILE --tokenizer {repo} --out DIR",
}
"""A command that uses each kind of folder."""


@dataclass(frozen=True)
class Publication:
    """A folder that was checked and found complete."""

    kind: str
    """A key of USES."""
    directory: Path
    weights: dict[str, Path]
    """Files by their names in the folder, without the card and the sheets."""
    settings: dict[str, Any]
    """The configuration of the weights, for the card."""
    sheets: dict[str, Path] = field(default_factory=dict)
    """Pictures in the folder."""

    @classmethod
    def of(cls, directory: Path) -> "Publication":
        """Read a folder and check its hashes.

        Raises: FileNotFoundError, ValueError for a folder that is none of these kinds, is damaged, or holds files that
        do not belong.
        """
        if not directory.is_dir():
            raise FileNotFoundError(f"there is no folder {directory}; give a bundle, a checkpoint or an adapter")
        kind, names, settings = _contents(directory)
        inside = _reach(directory)
        weights, sheets, strangers = dict[str, Path](), dict[str, Path](), list[str]()
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if not path.resolve().is_relative_to(inside):
                raise ValueError(f"{path} is a link that points outside the folder; replace it with the file")
            if path.is_dir() or name == CARD or path.name == LOCK_NAME:
                continue
            if name in names:
                weights[name] = path
            elif path.suffix == SHEET_SUFFIX and path.parent == directory and not is_temporary(path):
                sheets[name] = path
            else:
                strangers.append(name)
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise ValueError(f"{directory / strangers[0]}{more}: not part of the {kind}; move it elsewhere")
        return cls(kind, directory, weights, settings, sheets)

    def card(self, repo: str, license: str | None) -> str:
        """Markdown with the front matter that the hub reads; it ends with the text of the folder's own README.md.

        If that README.md has front matter, it is the card, unchanged. Raises: ValueError for a license that is not an
        identifier, or that is given although the folder has such a card.
        """
        if license is not None and not LICENSE.fullmatch(license):
            raise ValueError(f"--license {license}: expected a license identifier, such as apache-2.0")
        own = self._own_text()
        if own.startswith("---"):
            if license is not None:
                raise ValueError(f"{self.directory / CARD} has front matter of its own; write the license there")
            return own
        front: dict[str, Any] = {} if license is None else {"license": license}
        front |= {"library_name": "cogvideo", "tags": ["cogvideo", "text-to-video"]}
        if self.kind == "adapter":
            front["tags"].append("lora")
        if self.kind != "image tokenizer":
            front["pipeline_tag"] = "text-to-video"
        parts = [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {repo.partition('/')[2]}",
            f"{self._with_article} of cogvideo {__version__}, which generates videos from captions.",
            f"```bash\n{USES[self.kind].format(repo=repo)}\n```",
            *(f"![samples]({name})" for name in self.sheets),
            f"## Config\n\n```yaml\n{yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)}```",
            *self._training(),
            *([own.strip()] if own else []),
        ]
        return "\n\n".join(parts) + "\n"

    def upload(self, repo: str, *, private: bool = False, license: str | None = None) -> str:
        """Upload to a repository, which is created if it does not exist; returns the URL of the commit.

        Raises: as `card` and `hub.upload`.
        """
        card = self.card(repo, license).encode()
        files: dict[str, Path | bytes] = {**self.weights, **self.sheets, CARD: card}
        return upload(repo, files, private=private, message=f"{self._with_article} by cogvideo {__version__}")

    @property
    def _with_article(self) -> str:
        """The kind, to begin a sentence."""
        return f"{'An' if self.kind[0] in 'aeiou' else 'A'} {self.kind}"

    def _own_text(self) -> str:
        file = self.directory / CARD
        if not file.is_file():
            return ""
        if file.stat().st_size > MAX_CARD_BYTES:
            raise ValueError(f"{file} is larger than {MAX_CARD_BYTES >> 20} MiB; shorten it")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8; convert it") from None

    def _training(self) -> Iterator[str]:
        """A section per run that made the weights: its data, and its last metrics."""
        for name, run in self._runs().items():
            config, metrics = read_yaml(run / "config.yaml"), _last_metrics(run / "metrics.jsonl")
            lines = [f"## Training of {name}", *_describe_data(config)]
            if metrics:
                rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in metrics.items())
                lines.append(f"| metric | last value |\n|---|---|\n{rows}")
            yield "\n\n".join(lines)

    def _runs(self) -> dict[str, Path]:
        """Run folders, by the name of what they trained."""
        folder = self.directory.resolve()
        if folder.parent.name == "export":
            runs = {folder.name: folder.parent.parent}
        else:
            runs = {name: folder.parent / name for name in (*MODELS, *SUPERRES)} if self.kind == "bundle" else {}
        return {name: run for name, run in runs.items() if (run / "config.yaml").is_file()}


def _reach(directory: Path) -> Path:
    """The folder that links in `directory` may point into: itself, or the repository's cache if it was fetched."""
    root = directory.resolve()
    if describe(root) == str(root):
        return root
    return next(parent.parent for parent in root.parents if parent.name == "snapshots")


def _contents(directory: Path) -> tuple[str, set[str], dict[str, Any]]:
    """The kind of a folder, the names of its files, and its settings. Raises: FileNotFoundError, ValueError."""
    kinds: dict[str, Callable[[Path], tuple[set[str], dict[str, Any]]]] = {
        "sequential": _bundle_contents,
        SETTINGS: _adapter_contents,
        MANIFEST: _checkpoint_contents,
        CHECKPOINT_WEIGHTS: _tokenizer_contents,
    }
    names = {"sequential": "bundle", SETTINGS: "adapter", MANIFEST: "checkpoint", CHECKPOINT_WEIGHTS: "image tokenizer"}
    for mark, contents in kinds.items():
        if (directory / mark).exists():
            return names[mark], *contents(directory)
    raise ValueError(f"{directory} is not a bundle, checkpoint, adapter or image tokenizer of cogvideo; give another")


def _bundle_contents(directory: Path) -> tuple[set[str], dict[str, Any]]:
    names = {name for name in (*HASHED_FILES, "bundle.json", SETTINGS_FILE) if (directory / name).is_file()}
    _, image_tokenizer, _ = open_tokenizers(directory)
    open_high_res_tokenizer(directory, image_tokenizer)
    read_config(directory)
    settings = {}
    for model in (*MODELS, *SUPERRES.values()):
        if (directory / model).is_dir():
            own, settings[model] = _checkpoint_contents(directory / model, beside=directory)
            names |= {f"{model}/{name}" for name in own}
    return names, settings


def _checkpoint_contents(directory: Path, beside: Path | None = None) -> tuple[set[str], dict[str, Any]]:
    """`beside`: the bundle that the checkpoint is part of, which may hold its trunk."""
    checkpoint = load_checkpoint(directory)
    if checkpoint.trunk is not None and beside is None:
        raise ValueError(
            f"{directory} is stored without its trunk, which is {checkpoint.trunk.directory}; give the folder that "
            "holds both if it is a bundle, or assemble one with `cogvideo bundle`"
        )
    config = stored_config(checkpoint)
    check_fits(checkpoint, config)
    files = read_json(directory / MANIFEST, Manifest)["files"]
    return {MANIFEST, CONFIG} | {name for name in files if name == INDEX or SHARD_NAME.fullmatch(name)}, to_dict(config)


def _adapter_contents(directory: Path) -> tuple[set[str], dict[str, Any]]:
    adapter = load_adapter(directory)
    model = {} if adapter.base is None else {"model": adapter.base["model"], "sha256": adapter.base["sha256"]}
    names = {name for name in (SETTINGS, ADAPTER_WEIGHTS, BASE) if (directory / name).is_file()}
    return names, {"rank": adapter.rank, "matrices": len(adapter.factors), **({"base": model} if model else {})}


def _tokenizer_contents(directory: Path) -> tuple[set[str], dict[str, Any]]:
    return {CONFIG, CHECKPOINT_WEIGHTS}, to_dict(ImageTokenizer.load(directory).config)


def _describe_data(config: Mapping[str, Any]) -> Iterator[str]:
    """What a run was trained on, one line per data set; folders by name only, without their location."""
    data = config.get("data") or {}
    if data.get("embedded_clips"):
        yield f"Data: {data['embedded_clips']} clips of moving digits."
    paths = data.get("path") or []
    for path in [paths] if isinstance(paths, str) else paths:
        rows: Any = None
        with suppress(OSError, ValueError):
            rows = read_json(Path(path) / MANIFEST, dict[str, Any]).get("rows")
        yield f"Data: `{Path(path).name}`{f', {rows:,} rows' if isinstance(rows, int) else ''}."


def _last_metrics(file: Path) -> dict[str, float]:
    """The last step, and the last value of each of the SHOWN_METRICS."""
    found: dict[str, float] = {}
    if file.is_file():
        for line in file.read_bytes().splitlines():
            with suppress(ValueError):
                record = checked(parse_json(line, file, allow_nan=True), dict[str, Any], file)
                numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
                found |= {key: value for key, value in numbers.items() if key == "step" or SHOWN_METRICS.fullmatch(key)}
    return dict(sorted(found.items()))
