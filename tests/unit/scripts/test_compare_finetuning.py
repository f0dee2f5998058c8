"""scripts/compare_finetuning.py: settings that differ in the arm alone, and its tables."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cogvideo.config import load_config, to_dict
from cogvideo.training.config import TrainConfig
from tests.helpers.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("compare_finetuning")


def test_arms_differ_in_adapters_and_learning_rate_alone(script: ModuleType, tmp_path: Path) -> None:
    comparison = script.Comparison(tmp_path, 60, [0], 10, 4)
    arms = [to_dict(load_config(TrainConfig, [script.CONFIG], comparison.words(arm, 0))) for arm in script.ARMS]
    for group in ("train", "data", "init"):
        assert arms[0][group] == arms[1][group] == arms[2][group]
    assert [arm["lora"]["rank"] for arm in arms] == [0, 16, 16] and len({arm["run_dir"] for arm in arms}) == 3
    assert ["embeddings" in arm["lora"]["targets"] for arm in arms] == [False, False, True]
    assert [step.name for step in comparison.data_steps()][::2] == ["train_videos", "validation_videos"]


def test_tables_have_means_spreads_and_memory_above_idle(script: ModuleType) -> None:
    right = {"colour": 0.5, "all_right": 0.25}
    probes: dict[str, Any] = {"new": right, "basic": right}
    arms = {arm: {"ema": {0: {"loss": 1.0, **probes}, 1: {"loss": 3.0, **probes}}} for arm in script.ARMS}
    cost = {"seconds_per_step": 2.0, "fastest_seconds_per_step": 1.5, "peak_mib": 500.0, "planned_mib": 120.0}
    text = script.as_tables(
        {
            "settings": {"steps": 60, "seeds": [0, 1], "prompts": 4},
            "ceiling": probes,
            "before": {"loss": 4.0, **probes},
            "after": arms,
            "costs": dict.fromkeys(script.ARMS, cost),
            "idle_mib": 400.0,
        }
    )
    assert "| tokenizer's round trip |  | - | 50 % | 25 % | 50 % | 25 % |" in text
    assert "| LoRA, rank 16 | ema | 2.0000 ± 1.4142 | 50 ± 0 % | 25 ± 0 % | 50 ± 0 % | 25 ± 0 % |" in text
    assert "| all weights | 2.00 | 1.50 | 100 | 120 |" in text


def test_a_folder_is_continued_with_its_own_steps_and_clips(script: ModuleType, tmp_path: Path) -> None:
    script.Comparison(tmp_path / "out", 60, [0], 10, 4).begin()
    script.Comparison(tmp_path / "out", 60, [0, 1], 10, 8).begin()
    for steps, clips in ((90, 10), (60, 20)):
        with pytest.raises(ValueError, match="give the same, or another --out"):
            script.Comparison(tmp_path / "out", steps, [0], clips, 4).begin()
