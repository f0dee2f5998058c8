"""scripts/pretrain_bodies.py as data: order of the steps, sizes that fit each other, schedules that fill a time."""

from pathlib import Path

from cogvideo.config import load_config
from cogvideo.data.prepare import PrepareConfig
from cogvideo.training.config import TrainConfig
from tests.helpers.scripts import ROOT, load_script

script = load_script("pretrain_bodies")
OUT = Path("/somewhere/bodies")


def recipe(clips=12000):
    return {step.name: step for step in script.recipe(OUT, "cpu", 1, clips)}


def train_config(step):
    words = [word for word in step.words if "=" in word]
    return load_config(TrainConfig, [ROOT / step.words[step.words.index("--config") + 1]], words)


def test_every_step_has_its_inputs():
    outputs: list[Path] = []
    for step in recipe().values():
        if step.words[0] == "train":
            config = train_config(step)
            data, init = config.data, config.init
            named = [*data.path, *data.validation, data.text_tokenizer, data.image_tokenizer, init.checkpoint]
            needed, output = [Path(path) for path in named if path is not None], config.run_dir
        else:
            output = Path(step.words[step.words.index("--out") + 1])
            needed = [Path(word) for word in step.words if word.startswith(str(OUT)) and Path(word) != output]
        for path in needed:
            assert any(path.is_relative_to(folder) for folder in outputs), f"{step.name} needs {path}"
        outputs.append(output)
    assert outputs[-1] == OUT / "bundle"


def test_everything_is_written_under_out():
    for step in recipe().values():
        assert not any("runs/bodies" in word for word in step.words)
        if step.words[0] == "train":
            config = train_config(step)
            assert config.run_dir == OUT / step.name
            paths = [*config.data.path, *config.data.validation, config.data.text_tokenizer, config.init.checkpoint]
            assert all(path is None or path.is_relative_to(OUT) for path in paths), step.name


def test_models_take_the_frames_that_are_prepared():
    steps = recipe()
    pairs = load_config(PrepareConfig, [ROOT / "configs/data/bodies_pairs.yaml"], [])
    clips = load_config(PrepareConfig, [ROOT / "configs/data/bodies.yaml"], [])
    side = train_config(steps["sequential"]).model.frame_side
    assert clips.frame_pixels == pairs.low_res_pixels == 8 * side
    for name in ("superres_direct", "superres_iterative"):
        superres = train_config(steps[name]).superres
        assert (superres.low_res_side, superres.high_res_side) == (side, pairs.frame_pixels // 8)


def test_every_training_step_has_a_share_of_the_time():
    assert [name for name, step in recipe().items() if step.words[0] == "train"] == list(script.TRAINING_HOURS)


def test_the_documented_hours_are_those_of_the_script():
    page = (ROOT / "docs/guides/bodies.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith(("| image tok", "| trunk", "| stage", "| super-res"))]
    hours = [float(word) for row in rows for word in row.strip(" |").split("|")[-1].split(" and ")]
    assert hours == list(script.TRAINING_HOURS.values())


def test_few_clips_make_no_more():
    steps = recipe(clips=10)
    counts = [step.words[step.words.index("--count") + 1] for step in steps.values() if "--count" in step.words]
    assert counts == ["10", "10"]


def test_clips_are_rendered_once():
    """The extra clips are of another seed: the same scenes again would teach nothing."""
    rendered = {}
    for step in recipe().values():
        if step.words[0] == "worlds" and step.words[step.words.index("--split") + 1] == "train":
            seed = step.words[step.words.index("--seed") + 1] if "--seed" in step.words else "0"
            rendered[seed] = int(step.words[step.words.index("--count") + 1])
    assert rendered == {"0": script.LARGE_CLIPS, "1": 12000 - script.LARGE_CLIPS}
