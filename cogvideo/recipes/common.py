"""What the recipes share: settings of a training step, held-out videos, the bundle and its samples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideo.data.captions import CaptionsFile
from cogvideo.recipes.folder import RecipeFolder
from cogvideo.recipes.steps import Step
from cogvideo.recipes.survey import Survey, example_prompts

GPU_BATCHES = 8
"""A GPU's batches are larger by this factor: small ones leave it waiting for the next kernel."""
PASSES = 100
"""If no time is given: passes over the data after which a training run ends, unless it ends earlier anyway."""
VALIDATION_VIDEOS = 40
"""With at least this many videos, the fraction VALIDATION of them is held out."""
VALIDATION = 0.05
PROMPTS, NUM_PROMPTS = "prompts.txt", 4
"""A few of the captions, as examples."""


def holds_out(survey: Survey) -> bool:
    """Whether there are enough videos to hold some out for validation."""
    return survey.num_videos >= VALIDATION_VIDEOS


def batch_size(on_cpu: int, num_gpus: int) -> int:
    """Clips or frames per step, a multiple of the number of processes; `on_cpu` of them without GPUs."""
    return on_cpu * (GPU_BATCHES * num_gpus or 1)


def training_settings(
    folder: RecipeFolder,
    name: str,
    rows: int,
    values: dict[str, Any],
    *,
    data: Sequence[Path],
    validation: Sequence[Path] | None,
    batch_size: int,
    processes: int,
    steps: int | None,
) -> dict[str, Any]:
    """Settings of one training run on `rows` clips or frames. `steps` None: the schedule is added later."""
    while batch_size > max(4, processes, rows):
        batch_size //= 2
    train: dict[str, Any] = {"batch_size": batch_size}
    warmup, log = 20, {"validate_every": 200}
    if steps is not None:
        train["steps"] = steps = min(steps, max(50, PASSES * rows // batch_size))
        warmup = min(100, steps // 10)
        log = {
            "save_every": max(1, steps // 8),
            "preview_every": max(1, steps // 8),
            "validate_every": max(1, steps // 8),
        }
    paths = {"path": [str(path) for path in data]}
    if validation is not None:
        paths["validation"] = [str(path) for path in validation]
    return {
        **values,
        "run_dir": str(folder / name),
        "data": {**values.get("data", {}), **paths},
        "optimiser": {**values.get("optimiser", {}), "warmup_steps": warmup},
        "train": {**values.get("train", {}), **train},
        "log": log,
    }


def bundle_step(
    folder: RecipeFolder, parts: Mapping[str, str | Path], captions: CaptionsFile, write_sampling: Callable[[], None]
) -> Step:
    """The step that runs `cogvideo bundle`; a few of the captions become the bundle's example prompts."""

    def write() -> None:
        write_sampling()
        _write_prompts(folder, captions)

    options = {**parts, "--examples": folder / PROMPTS}
    words = ["bundle", "--overwrite", *(word for option in options.items() for word in option)]
    return folder.step("bundle", words, prepare=write)


def samples_step(folder: RecipeFolder, name: str, model: Path, captions: CaptionsFile) -> Step:
    """A step that samples a few of the captions, always the same ones and with the same seed."""
    words = ("sample", "--model", model, "--prompts", folder / PROMPTS, "--out", folder / name, "--overwrite")
    return folder.step(name, words, prepare=lambda: _write_prompts(folder, captions))


def _write_prompts(folder: RecipeFolder, captions: CaptionsFile) -> None:
    prompts = folder / PROMPTS
    if not prompts.is_file():
        prompts.write_text("\n".join(example_prompts(captions, NUM_PROMPTS)) + "\n", encoding="utf-8")
