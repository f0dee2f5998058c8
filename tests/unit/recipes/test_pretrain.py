"""What pretraining's config files say on different machines."""

import shutil

import pytest

from cogvideo.config import read_yaml
from cogvideo.data.readers import open_captions
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.recipes.folder import RecipeFolder
from cogvideo.recipes.pretrain import Choices, PretrainRecipe
from cogvideo.recipes.survey import Survey


@pytest.mark.parametrize("num_gpus", [0, 2])
def test_on_gpus_the_planner_fits_the_transformers_into_memory(tmp_path, num_gpus):
    (tmp_path / "captions.csv").write_text("video,caption\na.mp4,a dog\n")
    choices = Choices.of(Survey(100, 100, (4.0,), 25.0, 360), pixels=None, num_gpus=num_gpus, bf16=True)
    folder = RecipeFolder(tmp_path / "out")
    folder.path.mkdir()
    shutil.copy(BUNDLED_WEIGHTS / "text.model", folder / "text.model")
    PretrainRecipe(folder, open_captions(tmp_path / "captions.csv"), (), choices)._write_base()
    train = read_yaml(folder.config("base"))["train"]
    expected = {"dtype": "bf16", "micro_batch_size": "auto", "recompute": "auto"} if num_gpus else {"dtype": "bf16"}
    assert train == expected
