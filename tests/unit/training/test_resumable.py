"""Which settings a resumed run may change."""

from pathlib import Path
from typing import Any

import pytest

from cogvideo.config import to_dict
from cogvideo.training.config import TrainConfig, changed_settings, check_resumable


def changed(task: str, key: str, value: Any) -> list[tuple[str, Any, Any]]:
    """What changes when a run of `task` with the default settings is resumed with another value of `key`."""
    before, now = (to_dict(TrainConfig()) | {"task": task} for _ in range(2))
    group, _, name = key.partition(".")
    now[group][name] = value
    return list(changed_settings(before, now))


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("superres", "model.hidden_size"),
        ("superres", "tokenizer.num_codes"),
        ("tokenizer", "model.num_layers"),
        ("tokenizer", "superres.high_res_side"),
        ("sequential", "tokenizer.num_codes"),
        ("image", "superres.num_layers"),
    ],
)
def test_other_networks_do_not_concern_a_run(task: str, key: str) -> None:
    assert changed(task, key, 12) == []


@pytest.mark.parametrize(
    ("task", "key"),
    [("superres", "superres.num_layers"), ("tokenizer", "tokenizer.num_codes"), ("interpolation", "model.num_heads")],
)
def test_the_structure_of_a_runs_own_network_is_fixed(task: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"runs/a cannot be resumed with {key}=12 "):
        check_resumable(changed(task, key, 12), Path("runs/a"))


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "text_len"])
@pytest.mark.parametrize(("task", "group"), [("superres", "superres"), ("sequential", "model")])
def test_dropout_and_text_length_may_change(task: str, group: str, name: str) -> None:
    changes = changed(task, f"{group}.{name}", 0)
    assert [key for key, _, _ in changes] == [f"{group}.{name}"]
    check_resumable(changes, Path("runs/a"))
