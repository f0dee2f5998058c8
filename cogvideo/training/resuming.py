"""How a resumed run differs from the one that saved its checkpoint, beyond the settings that `config.py` compares."""

from collections.abc import Mapping
from typing import Any

from cogvideo.logs import get_logger
from cogvideo.training.config import TrainConfig

log = get_logger(__name__)


def changed_types(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The settings of the type that weights are held in, old and new; None if the type is the same.

    `before`, `now`: the settings of the group `train`.
    """
    weights, dtypes = ([train.get(key, "fp32") for train in (before, now)] for key in ("weights", "dtype"))
    held = [dtype if weight == "dtype" else "fp32" for weight, dtype in zip(weights, dtypes, strict=True)]
    if held[0] == held[1]:
        return None
    old, new = (f"train.weights={w} train.dtype={d}" for w, d in zip(weights, dtypes, strict=True))
    return old, new


def warn_of_other_masks(saved: Mapping[str, Any], config: TrainConfig, world_size: int) -> None:
    """Warn if dropout draws other masks than in an uninterrupted run, because steps have other micro-batches.

    `saved`: the numbers of a checkpoint; `world_size`: the current number of processes.
    """
    before, model = saved["config"]["train"], config.superres if config.task == "superres" else config.model
    is_dropped = config.task != "tokenizer" and max(model.dropout, model.attention_dropout, config.lora.dropout) > 0
    size, old = before.get("micro_batch_size"), len(saved["averages"])
    if size:
        old = before["batch_size"] // size
    new = world_size * config.train.accumulation(world_size)
    if is_dropped and old != new:
        log.warning(
            "the number of micro-batches per step changed from %d to %d, so dropout masks differ from those of an "
            "uninterrupted run; set train.micro_batch_size=%d to restore it",
            *(old, new, max(1, config.train.batch_size // old)),
        )
