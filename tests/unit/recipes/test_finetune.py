"""Finetuning: what is trained on which machine, batches, bundles that cannot be finetuned."""

import shutil
from dataclasses import replace
from itertools import pairwise

import pytest

from cogvideo.data.readers import open_captions
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.planning.machines import MACHINES
from cogvideo.recipes.common import training_settings
from cogvideo.recipes.finetune import Base, FinetuneRecipe, choose_mode
from cogvideo.recipes.folder import RecipeFolder
from cogvideo.recipes.survey import Survey


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe for the bundled weights on some GPUs."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "captions.csv").write_text("video,caption\na.mp4,a dog\n")
    captions, base = open_captions(folder / "captions.csv"), Base.open(BUNDLED_WEIGHTS)
    survey = Survey(100, 100, (4.0,), 25.0, 360)
    return lambda num_gpus: FinetuneRecipe(
        RecipeFolder(folder / "out"), base, captions, (), survey, 0, "all", bf16=True, num_gpus=num_gpus
    )


@pytest.mark.parametrize("num_gpus", [1, 3, 7])
def test_a_small_bundle_is_trained_whole_on_any_number_of_gpus(recipe, num_gpus):
    """Its batches divide among them."""
    mode, reason = choose_mode(recipe(num_gpus), MACHINES["rtx4090-24"])
    assert mode == "all" and "by the planner's estimate" in reason


def test_larger_frames_are_planned_with_their_positions(recipe):
    """They need more than the 1,024 positions of the default."""
    small = recipe(1)
    larger = replace(small.base.models["sequential"], frame_side=36, num_positions=36**2 + 32)
    base = replace(small.base, models=small.base.models | {"sequential": larger})
    assert choose_mode(replace(small, base=base), MACHINES["rtx4090-24"])[0] == "all"


def test_what_does_not_fit_is_trained_by_adapters(recipe):
    mode, reason = choose_mode(recipe(1), replace(MACHINES["rtx4090-24"], memory_bytes=2e7))
    assert mode == "lora" and "adapters of rank 16" in reason and "at least" in reason


def test_batches_divide_among_the_gpus_however_few_clips_there_are(recipe):
    for num_gpus in range(9):
        tried = recipe(num_gpus)
        for rows in (1, 3, 50, 5000):
            values = training_settings(
                *(tried.folder, "trunk", rows, {}),
                data=[],
                validation=None,
                batch_size=tried.batch_size("trunk"),
                processes=tried.processes,
                steps=8,
            )
            size = values["train"]["batch_size"]
            assert size % tried.processes == 0 and size <= max(4, tried.processes, rows)


@pytest.mark.parametrize("missing", ["sequential", "interpolation"])
def test_a_bundle_without_a_stage_is_one_line(tmp_path, missing):
    shutil.copytree(BUNDLED_WEIGHTS, tmp_path / "part", ignore=shutil.ignore_patterns(missing))
    with pytest.raises(FileNotFoundError, match=f"part is not a complete bundle of weights: {missing}/ is missing"):
        Base.open(tmp_path / "part")


def test_stages_with_clips_of_other_numbers_of_frames_get_data_of_their_own(recipe):
    """Nine key frames in 8 s are as far apart as five in 4 s, and so are stage 2's clips."""
    five = recipe(0)
    assert [step.name for step in five.steps()][:2] == ["clips", "trunk"]
    assert five.base.between_seconds(five.survey) == (2.0, 1.0, 0.5)
    models = five.base.models | {"sequential": replace(five.base.models["sequential"], num_frames=9)}
    base = replace(five.base, models=models, sampling=replace(five.base.sampling, seconds=8.0))
    nine = replace(five, base=base, survey=Survey(100, 100, (9.0,), 25.0, 360))
    assert base.between_seconds(nine.survey) == (2.0, 1.0, 0.5)
    assert base.clip_seconds(nine.survey) == (8.0, 4.0, 2.0, 1.0)
    assert [step.name for step in nine.steps()][:2] == ["clips", "clips_between"]
    values = nine.training_values("interpolation")
    assert values["data"]["clip_seconds"] == [2.0, 1.0, 0.5]


def test_clusters_of_both_image_tokenizers_stay(recipe, tmp_path):
    base = tmp_path / "base"
    for name in ("image_tokenizer", "high_res_tokenizer"):
        (base / name).mkdir(parents=True)
    tried = replace(recipe(0), base=replace(recipe(0).base, path=base))
    assert options_of(tried.steps(), "bundle", "clusters") == {"--clusters": "500", "--high-res-clusters": "500"}
    for name in ("clusters.npy", "high_res_clusters.npy"):
        (base / name).touch()
    own = {"--clusters": f"{base}/clusters.npy", "--high-res-clusters": f"{base}/high_res_clusters.npy"}
    assert options_of(tried.steps(), "bundle", "clusters") == own
    grown = options_of(replace(tried, new_pieces=1).steps(), "bundle", "clusters")
    assert grown["--high-res-clusters"] == str(tried.folder / "base/high_res_clusters.npy")


def options_of(steps, name, part):
    """The options of a step whose names have this part."""
    (words,) = (step.words for step in steps if step.name == name)
    return {str(a): str(b) for a, b in pairwise(words) if part in str(a) and str(a).startswith("--")}
