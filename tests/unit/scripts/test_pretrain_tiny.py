"""scripts/pretrain_tiny.py as data: the inputs of every step, as configs name them, are outputs of earlier steps."""

from pathlib import Path

import pytest

from cogvideo.config import load_config
from cogvideo.training.config import TrainConfig
from tests.helpers.scripts import ROOT, load_script

pretrain_tiny = load_script("pretrain_tiny")


@pytest.mark.parametrize(("long", "superres"), [(False, False), (True, False), (True, True)])
def test_every_step_has_its_inputs(long: bool, superres: bool) -> None:
    outputs: list[Path] = []
    for step in pretrain_tiny.recipe(Path("out"), long, superres):
        needed = [Path(word) for word in step.words if word.startswith("runs/tiny/")]
        if step.words[0] == "train":
            config = load_config(TrainConfig, [ROOT / step.words[step.words.index("--config") + 1]], [])
            data, init = config.data, config.init
            named = [*(data.path or []), *(data.validation or [])]
            named += [data.text_tokenizer, data.image_tokenizer, data.high_res_tokenizer, init.checkpoint]
            needed = [Path(path) for path in named if path is not None]
            output = config.run_dir
        else:
            output = Path(step.words[step.words.index("--out") + 1])
            needed = [path for path in needed if path != output]
        for path in needed:
            assert any(path.is_relative_to(folder) for folder in outputs), f"{step.name} needs {path}"
        outputs.append(output)
    assert outputs[-1] == Path("out")
