"""Our config for a SAT checkpoint: from its tensor shapes, its model_config.json, and the user's settings."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from cogvideo.checkpoint.parameters import ModelKind, TransformerConfig, model_kind, parameter_shapes
from cogvideo.checkpoint.sat.reader import OWN_CONFIG, SatCheckpoint
from cogvideo.config import from_dict, to_dict
from cogvideo.model.config import ModelConfig, ModelTask
from cogvideo.sequence.layout import Vocabulary
from cogvideo.superres.config import SuperresConfig

PUBLISHED_HEAD_DIM = 64
PUBLISHED_WINDOW = 10
UNREAD: dict[ModelKind, tuple[str, ...]] = {
    "image": ("window_size",),
    "direct_superres": ("task", "frame_position_start", "window_size"),
    "iterative_superres": ("task", "frame_position_start", "window_size"),
}
"""Settings that a kind of model does not have."""


@dataclass(frozen=True)
class VocabularyIds:
    """The ids that no checkpoint stores; defaults are icetk's."""

    num_image_tokens: int = Vocabulary.num_image_tokens
    pad: int = Vocabulary.pad
    newline: int = Vocabulary.newline
    start_of_image: int = Vocabulary.start_of_image


@dataclass(frozen=True)
class SatSettings:
    """What `cogvideo convert` takes as key=value. Null: the checkpoint's value, else the published one."""

    vocab: VocabularyIds = field(default_factory=VocabularyIds)
    task: ModelTask | None = None
    """For CogVideo: `sequential` (stage 1) or `interpolation` (stage 2); their tensors look alike."""
    num_heads: int | None = None
    text_len: int | None = None
    frame_side: int | None = None
    frame_position_start: int = ModelConfig.frame_position_start
    window_size: int | None = None
    """Side of the temporal windows in tokens; 0 for full attention."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "text_len", "frame_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1, or null for the checkpoint's value")


def config_for(sat: SatCheckpoint, settings: SatSettings) -> dict[str, Any]:
    """{'model': ...} or {'superres': ...}, ready for our config.json.

    Raises: ValueError in one line if the sizes contradict each other, or the stage is unknown.
    """
    if sat.own_config:
        return _own_config(sat, settings)
    _check_settings(sat, settings)
    sat_config, sizes = sat.model_config, sat.sizes
    ids = settings.vocab
    highest = max(ids.num_image_tokens - 1, ids.pad, ids.newline, ids.start_of_image)
    if highest >= sizes.vocabulary:
        raise ValueError(
            f"{sat.directory} has {sizes.vocabulary} embedding rows, too few for the vocabulary id {highest}; give "
            "vocab.num_image_tokens=, vocab.pad=, vocab.newline= and vocab.start_of_image= of its tokenizer"
        )
    common = dict(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_heads=settings.num_heads
        or _positive_int(sat_config, "num_attention_heads")
        or max(1, sizes.hidden_size // PUBLISHED_HEAD_DIM),
        num_positions=sizes.num_positions,
        vocabulary=Vocabulary(sizes.vocabulary, ids.num_image_tokens, ids.pad, ids.newline, ids.start_of_image),
    )
    _check_model_config(sat)
    if "superres" in sat.kind:
        return {"superres": to_dict(_superres_config(sat, settings, common))}
    text_len, frame_len = _lengths_from_layout(sat_config)
    if settings.frame_side:
        frame_len = settings.frame_side**2
    side = math.isqrt(frame_len)
    task: ModelTask = "image" if sat.kind == "image" else _task(sat, settings)
    num_frames = 1
    if task != "image":
        num_frames, remainder = divmod(sizes.num_extra_positions, frame_len)
        if remainder:
            raise ValueError(
                f"{sat.directory}: {sizes.num_extra_positions} extra positions are not a multiple of a frame of "
                f"{frame_len} tokens; give frame_side=..."
            )
    config = ModelConfig(
        task=task,
        text_len=settings.text_len or text_len,
        frame_side=side,
        num_frames=num_frames,
        frame_position_start=settings.frame_position_start,
        window_size=_window_size(sat_config, settings, task, side),
        **common,  # type: ignore[arg-type]
    )
    return {"model": to_dict(config)}


def _own_config(sat: SatCheckpoint, settings: SatSettings) -> dict[str, Any]:
    """The config that we wrote beside the tensors. Raises: ValueError if it contradicts them or the settings."""
    path = sat.directory / OWN_CONFIG
    config: TransformerConfig
    if "superres" in sat.own_config:
        config = from_dict(SuperresConfig, sat.own_config["superres"], origin=str(path))
    else:
        config = from_dict(ModelConfig, sat.own_config.get("model", {}), origin=str(path))
    shapes = {name: info.shape for name, info in sat.infos.items()}
    is_alike = model_kind(config) == sat.kind and config.num_layers == sat.sizes.num_layers
    if not is_alike or parameter_shapes(config) != shapes:
        raise ValueError(f"{path} does not fit the tensors in {sat.directory}; correct or remove it")
    ids = config.vocabulary
    values = {
        **vars(config),
        "vocab": VocabularyIds(ids.num_image_tokens, ids.pad, ids.newline, ids.start_of_image),
        "frame_side": config.low_res_side if isinstance(config, SuperresConfig) else config.frame_side,
        "window_size": getattr(config, "window_size", None) or 0,
    }
    others = [name for name in _given(settings) if getattr(settings, name) != values.get(name)]
    if others:
        raise ValueError(f"{path} has other values for {', '.join(others)}; leave them out, or remove that file")
    return {"superres" if isinstance(config, SuperresConfig) else "model": to_dict(config)}


def _given(settings: SatSettings) -> list[str]:
    """Names of the settings that differ from their defaults."""
    default = SatSettings()
    names = [field.name for field in fields(settings)]
    return [name for name in names if getattr(settings, name) != getattr(default, name)]


def _check_settings(sat: SatCheckpoint, settings: SatSettings) -> None:
    """Raises: ValueError for a setting that this kind of model does not have."""
    unread = [name for name in _given(settings) if name in UNREAD.get(sat.kind, ())]
    if sat.kind == "image" and settings.task not in (None, "image"):
        unread.insert(0, "task")
    if unread:
        names = ", ".join(unread)
        raise ValueError(f"{sat.directory} holds a model of kind {sat.kind}, which has no {names}; leave it out")


def _superres_config(sat: SatCheckpoint, settings: SatSettings, common: dict[str, Any]) -> SuperresConfig:
    direct = sat.kind == "direct_superres"
    high = math.isqrt(sat.sizes.num_extra_positions)
    low = settings.frame_side or ModelConfig.frame_side
    if high**2 != sat.sizes.num_extra_positions or high % low:
        raise ValueError(
            f"{sat.directory}: {sat.sizes.num_extra_positions} extra positions do not form a square grid whose side is "
            f"a multiple of {low} tokens; give frame_side=..."
        )
    return SuperresConfig(
        method="direct" if direct else "iterative",
        text_len=settings.text_len or (96 if direct else 16),
        low_res_side=low,
        high_res_side=high,
        **common,
    )


def _lengths_from_layout(sat_config: dict[str, Any]) -> tuple[int, int]:
    """Text length and frame length in tokens, from `layout` (the end of the text, of the first frame, of the clip).

    The published lengths if it is missing or inconsistent.
    """
    layout = sat_config.get("layout")
    if isinstance(layout, list) and len(layout) > 1 and all(type(n) is int for n in layout):
        text_len, frame_len = layout[0], layout[1] - layout[0]
        if text_len > 0 and frame_len > 0 and math.isqrt(frame_len) ** 2 == frame_len:
            return text_len, frame_len
    return ModelConfig.text_len, ModelConfig.frame_side**2


def _task(sat: SatCheckpoint, settings: SatSettings) -> ModelTask:
    if settings.task == "image":
        raise ValueError(
            f"{sat.directory} has temporal channels, so task=image is not possible; convert the trunk's own checkpoint"
        )
    if settings.task:
        return settings.task
    stage = sat.model_config.get("cogvideo_stage")
    if stage not in (1, 2):
        raise ValueError(
            f"{sat.directory}: model_config.json gives no cogvideo_stage, and the two stages' tensors look alike; "
            "give task=sequential (stage 1) or task=interpolation (stage 2)"
        )
    return "sequential" if stage == 1 else "interpolation"


def _window_size(sat_config: dict[str, Any], settings: SatSettings, task: ModelTask, side: int) -> int | None:
    if task == "image" or settings.window_size == 0:
        return None
    window = settings.window_size or _positive_int(sat_config, "window_size")
    if window is None and task == "interpolation":  # the published stage 2 always has windows
        window = PUBLISHED_WINDOW if side % PUBLISHED_WINDOW == 0 else None
    return window


def _positive_int(sat_config: dict[str, Any], key: str) -> int | None:
    value = sat_config.get(key)
    return value if type(value) is int and value > 0 else None


def _check_model_config(sat: SatCheckpoint) -> None:
    """model_config.json may be missing or partial, but what it gives must agree with the tensors."""
    for key, actual in (("num_layers", sat.sizes.num_layers), ("hidden_size", sat.sizes.hidden_size)):
        if key in sat.model_config and sat.model_config[key] != actual:
            raise ValueError(
                f"{sat.directory / 'model_config.json'} has {key}={sat.model_config[key]!r}, the tensors have "
                f"{actual}; correct or remove it"
            )
