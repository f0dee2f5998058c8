"""Sizes of a model that follow from its data, for settings that leave them out."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvideo.config import read_yaml
from cogvideo.files import read_json
from cogvideo.hub import resolve
from cogvideo.logs import get_logger
from cogvideo.model.config import ModelConfig

log = get_logger(__name__)

SIZES = {
    "model": ("frame_side", "num_frames", "num_positions"),
    "superres": ("high_res_side", "low_res_side"),
}


def sizes_from_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that `given`, the nested settings of a training run, leaves out, as far as they follow from its data.

    A run with a checkpoint, which can only be resumed, keeps the sizes that it began with. Otherwise frames are as
    large as those of data.path, and there are as many positions as in init.checkpoint, or as text and a frame need.
    Files that cannot be read are ignored here: the error is reported where they are opened.
    """
    task, data = given.get("task", "sequential"), _group(given, "data")
    group = "superres" if task == "superres" else "model"
    if task == "tokenizer" or not data.get("path"):
        return {}
    begun_with = Path(str(given.get("run_dir", ""))) / "config.yaml"
    known, sources = _group(_run_config(given), group), dict.fromkeys(SIZES[group], begun_with)
    if not known:
        paths = data["path"]
        first = paths[0] if isinstance(paths, Sequence) and not isinstance(paths, str) else paths
        if not isinstance(first, str | Path):
            return {}  # not a path, which is reported when the settings are checked
        manifest = Path(first) / "manifest.json"
        known, sources = _sizes_of(_read(manifest), group), dict.fromkeys(SIZES[group], manifest)
        if group == "model" and known:
            own = _group(given, "model")
            start = own.get("frame_position_start", ModelConfig.frame_position_start)
            side = own.get("frame_side", known.get("frame_side"))
            known["num_positions"] = start + side**2 if _are_counts(start, side) else None
            checkpoint = _group(given, "init").get("checkpoint")
            if checkpoint is not None:
                weights = _local(checkpoint) / "config.json"
                stored = _group(_group(_read(weights), "config"), "model")
                if "num_positions" in stored:
                    known["num_positions"], sources["num_positions"] = stored["num_positions"], weights
    missing = [name for name in SIZES[group] if name not in _group(given, group)]
    found = {name: known[name] for name in missing if _are_counts(known.get(name))}
    if not found:
        return {}
    for file in dict.fromkeys(sources[name] for name in found):
        names = [f"{group}.{name}={value}" for name, value in found.items() if sources[name] == file]
        log.info("%s: from %s", " ".join(names), file)
    return {group: found}


def _sizes_of(manifest: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Sizes in tokens of the frames in a prepared folder."""
    settings, tokenizer = _group(manifest, "config"), _group(manifest, "tokenizer")
    large = _group(manifest, "high_res_tokenizer") or tokenizer
    sides: dict[str, int] = {}
    for name, made_by in (("frame_pixels", large), ("low_res_pixels", tokenizer)):
        pixels, rate = settings.get(name), made_by.get("compress_rate")
        if isinstance(pixels, int) and isinstance(rate, int) and _are_counts(pixels, rate):
            sides[name] = pixels // rate
    if group == "superres":
        names = {"high_res_side": "frame_pixels", "low_res_side": "low_res_pixels"}
        return {name: sides[key] for name, key in names.items() if key in sides}
    if "frame_pixels" not in sides:
        return {}
    return {"frame_side": sides["frame_pixels"], "num_frames": _group(settings, "clips").get("num_frames")}


def _run_config(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the run that run_dir holds; empty if it has no checkpoint."""
    run_dir = given.get("run_dir")
    if run_dir is None:
        return {}
    with suppress(OSError, ValueError):
        run_dir = str(run_dir)
        if any(Path(run_dir).glob("checkpoints/step_*")):
            return read_yaml(Path(run_dir) / "config.yaml")
    return {}


def _local(checkpoint: Any) -> Path:
    with suppress(OSError, ValueError):
        return resolve(str(checkpoint))
    return Path(str(checkpoint))


def _read(path: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def _group(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = values.get(name)
    return group if isinstance(group, Mapping) else {}


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and value > 0 for value in values)
