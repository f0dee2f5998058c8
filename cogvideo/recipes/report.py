"""The report at the end of a recipe: clips, curves and sample sheets of the training runs, settings, commands."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cogvideo.evaluation.html_report import HtmlReport
from cogvideo.recipes.folder import RecipeFolder
from cogvideo.recipes.steps import Step
from cogvideo.sampling.outputs import read_samples
from cogvideo.training.metrics import MetricsFile

FILE = "report.html"
CLIP_WIDTH = 192
"""CSS pixels; clips of small models are enlarged."""
TITLES = {
    "tokenizer": "Image tokenizer",
    "trunk": "Text-to-image trunk",
    "sequential": "Stage 1: key frames",
    "interpolation": "Stage 2: frames between",
}


def write_report(
    folder: RecipeFolder, title: str, facts: Sequence[str], samples: Mapping[str, Path], steps: Sequence[Step]
) -> Path:
    """Write report.html and return its path.

    `facts`: paragraphs for the top. `samples`: folders that `cogvideo sample` wrote for the same prompts, keyed by
    label; clips of the same prompt are shown side by side.
    """
    report = HtmlReport(title)
    for fact in facts:
        report.text(fact)
    report.section("Clips")
    rows = {name: _clips(path) for name, path in samples.items()}
    first = next(iter(rows.values()))
    if len(rows) == 1:
        report.pictures([(path, prompt) for prompt, path in first.items()], CLIP_WIDTH)
    else:
        for number, prompt in enumerate(first):
            report.text(f"{number + 1}. {prompt}")
            report.pictures([(clips[prompt], name) for name, clips in rows.items() if prompt in clips], CLIP_WIDTH)
    for step in steps:
        run_dir = folder / step.name
        if step.words[0] != "train" or not (run_dir / "curves.png").is_file():
            continue
        report.section(TITLES.get(step.name, step.name))
        report.text(_losses(run_dir))
        pictures = [(run_dir / "curves.png", "by step")]
        sheets = sorted((run_dir / "previews").glob("*.png"))
        pictures += [(sheets[-1], f"sample sheet of step {int(sheets[-1].stem.split('_')[-1]):,}")] if sheets else []
        report.pictures(pictures)
    report.section("Settings and commands")
    report.text(
        f"The config files in {folder.path / 'configs'} are those that were used. To change something, edit them and "
        "run the commands by hand from the first step that they concern:"
    )
    report.preformatted("\n".join(step.shown for step in steps))
    report.write(folder / FILE)
    return folder / FILE


def _clips(folder: Path) -> dict[str, Path]:
    """The GIFs that `cogvideo sample` wrote, keyed by prompt."""
    return {sample["prompt"]: folder / f"{sample['name']}.gif" for sample in read_samples(folder)}


def _losses(run_dir: Path) -> str:
    """The last losses of a run, in words."""
    last: dict[str, str] = {}
    for entry in MetricsFile(run_dir / "metrics.jsonl").read():
        for key, name in (("loss", "training loss"), ("validation/loss", "validation loss")):
            if key in entry:
                last[name] = f"{name} {entry[key]:.4g} at step {entry['step']:,}"
    return "; ".join(last.values()) + "."
