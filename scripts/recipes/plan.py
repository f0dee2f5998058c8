"""Print the planner's memory and time for each recipe: the table of docs/guides/recipes.md.

python scripts/recipes/plan.py
"""

from pathlib import Path

from cogvideo.config import load_config
from cogvideo.planning.budgets import training_budget
from cogvideo.planning.machines import MACHINES
from cogvideo.planning.report import format_bytes, format_duration
from cogvideo.training.config import TrainConfig
from cogvideo.training.resources import planned_model, planned_settings, resolve_auto

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FROZEN = ("1x24gb", ("init.freeze_trunk=true",))
SIZES = {
    "5 frames of 20x20": ("recipe_own", ("1x24gb_lora", ())),
    "9 frames of 20x20": ("recipe_longer", FROZEN),
    "16 frames of 20x20": ("recipe_kinetics600", FROZEN),
    "5 frames of 30x30": ("recipe_larger", FROZEN),
}
"""For each clip size, a recipe's config and how one GPU of 24 GB trains it. Adapters do not train position embeddings,
so sizes other than the checkpoint's freeze the trunk instead."""
WHOLE: tuple[str, tuple[str, ...]] = ("8x80gb", ())


def row(size: str, config_name: str, machine_file: str, overrides: tuple[str, ...]) -> str:
    """A table row: clip size, machine, micro-batch and recomputation, memory per GPU, time of 1 and 1,000 steps."""
    files = [CONFIGS / f"train/{config_name}.yaml", CONFIGS / f"deepspeed/{machine_file}.yaml"]
    config = load_config(TrainConfig, files, list(overrides))
    machine, count = MACHINES[config.machine.gpu or ""], config.machine.count
    config = resolve_auto(config, machine, count)
    model, settings = planned_model(config), planned_settings(config, count)
    assert model is not None
    budget = training_budget(model, machine, settings)
    fits, host = "" if budget.fits(machine) else " (does not fit)", format_bytes(budget.host)
    memory = f"{format_bytes(budget.total)}{f' + {host} of CPU memory' if budget.host else ''}{fits}"
    how = " ".join((f"`{machine_file}.yaml`", *(f"`{word}`" for word in overrides)))
    what, seconds = f"{settings.micro_batch}, {settings.recompute}", budget.time.total
    return f"| {size} | {how} | {what} | {memory} | {format_duration(seconds)} | {seconds / 3.6:.1f} h |"


def main() -> None:
    for size, (config_name, small) in SIZES.items():
        for machine_file, overrides in (WHOLE, small):
            print(row(size, config_name, machine_file, overrides), flush=True)


if __name__ == "__main__":
    main()
