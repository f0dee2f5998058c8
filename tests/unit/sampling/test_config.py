"""Settings: the published defaults, derived values, and values that are refused."""

import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from cogvideo.config import load_config, to_dict
from cogvideo.inference.schedules import SCHEDULES
from cogvideo.sampling.bundle import load_sample_config
from cogvideo.sampling.config import STYLES, DrawConfig, SampleAndUpsampleConfig, SampleConfig
from cogvideo.sequence.prompt import PromptFormat

IN_ROW = ("temperature", "top_k_clusters", "token_temperature", "guidance_scale")
CONFIGS = Path(__file__).parents[3] / "configs" / "sample"


def in_effect(draw: DrawConfig) -> tuple[float, bool]:
    return draw.effective_text_bonus, draw.appends_video_suffix


def test_published_file_spells_out_the_defaults() -> None:
    written, default = load_config(SampleConfig, [CONFIGS / "published.yaml"]), SampleConfig()
    assert (written.seconds, written.rounds) == (default.seconds, default.rounds)
    for name in ("first_frame", "key_frames", "interpolation"):
        written_draw, default_draw = getattr(written, name), getattr(default, name)
        assert in_effect(written_draw) == in_effect(default_draw), name
        for field in ("temperature", "top_k_clusters", "token_temperature", "guidance_scale"):
            assert getattr(written_draw, field) == getattr(default_draw, field), (name, field)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_load(path: Path) -> None:
    """With and without super-resolution, whose settings some of them have."""
    clips, _ = load_config(SampleAndUpsampleConfig, [path]).split()
    assert load_sample_config(path.parent, [path], []) == clips
    with pytest.raises(
        ValueError, match=r"^upsample.seed=1 is a setting of super-resolution, used by `cogvideo sample"
    ):
        load_sample_config(path.parent, [path], ["upsample.seed=1"])


def test_every_schedule_of_the_engine_can_be_chosen() -> None:
    assert get_args(get_type_hints(SampleConfig)["schedule"]) == tuple(SCHEDULES)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_accepted(style: str) -> None:
    assert load_config(SampleConfig, [], [f"style={style}"]).style == style


def test_the_documentation_lists_every_setting() -> None:
    """docs/guides/sample.md has every setting with its published value, and every style with its suffix."""
    page = (Path(__file__).parents[3] / "docs/guides/sample.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.*]+)` \| (.*?) \|", page, re.MULTILINE))
    for name, value in to_dict(SampleConfig()).items():
        if isinstance(value, dict):
            expected = ["null" if value[field] is None else str(value[field]) for field in IN_ROW]
            assert rows[f"{name}.*"] == ", ".join(expected)
        else:
            assert rows[name] == ("null" if value is None else str(value).lower()), name
    for field in dataclasses.fields(DrawConfig):
        assert f"`{field.name}`" in page or f"*.{field.name}" in rows
    for style, suffix in STYLES.items():
        assert rows[style].startswith(f"`caption{PromptFormat().image_suffix if suffix is None else suffix}`")


def test_text_bonus_follows_guidance() -> None:
    assert DrawConfig().effective_text_bonus == 1.4
    assert DrawConfig(guidance_scale=3.0).effective_text_bonus == 0.0
    assert DrawConfig(guidance_scale=3.0, text_bonus=0.5).effective_text_bonus == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed=-1; expected 0 to 18446744073709551615"),
        ("seed=18446744073709551616", "seed=18446744073709551616; expected 0 to 18446744073709551615"),
        ("rounds=-1", "rounds=-1 must be at least 0"),
        ("rounds=60", "rounds=60 needs too much memory; give at most 8"),
        ("samples_per_prompt=1000000000000", "needs too much memory"),
        ("seconds=1e9", "at most 3600"),
        ("key_frames.guidance_scale=nan", "key_frames.guidance_scale=nan; expected a finite number"),
        ("interpolation.text_bonus=inf", "expected a finite number"),
        ("seconds=0", "seconds=0.0 must be above 0"),
        ("samples_per_prompt=0", "samples_per_prompt=0 must be at least 1"),
        ("num_clusters=0", "num_clusters=0 must be at least 1"),
        ("key_frames.temperature=0", "temperature=0.0 must be above 0"),
        ("interpolation.top_k_clusters=0", "top_k_clusters=0; expected 1 to 16777216"),
        ("key_frames.top_k_clusters=16777217", "top_k_clusters=16777217; expected 1 to 16777216"),
        ("style=cubist", "style='cubist' is not valid; expected one of none, mainbody, photo"),
        ("key_frames.guidance=2", "did you mean 'key_frames.guidance_scale'"),
    ],
)
def test_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_config(SampleConfig, [], [override])
