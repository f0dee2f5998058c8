"""Weights on the page: their names, and which adapters belong to which."""

import os
from pathlib import Path

import pytest

from cogvideo.demo.weights import BUNDLED_NAME, assign_adapters, name_weights
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.sampling.adapters import AdapterChoice


class FakePipeline:
    def __init__(self, *fitting: str) -> None:
        self.fitting = fitting

    def add_adapter(self, name: str, folder: Path) -> None:
        if folder.name not in self.fitting:
            raise ValueError(f"{folder} has another width")


def test_names_are_short_and_differ() -> None:
    folders = [BUNDLED_WEIGHTS, Path("runs/bodies/bundle"), Path("weights/bodies"), Path("mine")]
    assert list(name_weights(folders)) == [BUNDLED_NAME, "bodies", "bodies-2", "mine"]
    nearby = Path(os.path.relpath(BUNDLED_WEIGHTS))
    assert list(name_weights([nearby])) == [BUNDLED_NAME]
    with pytest.raises(ValueError, match=r"--model .*mine is given twice"):
        name_weights([Path("mine"), Path.cwd() / "mine"])


def test_an_adapter_belongs_to_all_weights_that_it_fits() -> None:
    adapters = {name: AdapterChoice(Path(name)) for name in "abc"}
    pipelines = {"one": FakePipeline("a", "b"), "two": FakePipeline("b", "c")}
    found = assign_adapters(adapters, pipelines)  # type: ignore[arg-type]
    assert {name: list(fitting) for name, fitting in found.items()} == {"one": ["a", "b"], "two": ["b", "c"]}
    adapters["d"] = AdapterChoice(Path("d"))
    with pytest.raises(ValueError, match="d fits none of the weights: d has another width"):
        assign_adapters(adapters, pipelines)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="b has another width"):
        assign_adapters(adapters, {"one": FakePipeline("a")})  # type: ignore[dict-item]
