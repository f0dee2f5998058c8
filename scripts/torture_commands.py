"""The commands that torture.py tries, their tiny inputs, and which of their files may differ between runs."""

import contextlib
import importlib
import json
import os
import pkgutil
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from cogvideo.checkpoint.adapter import Base, fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model
from cogvideo.config import dump_yaml
from cogvideo.tokenizers.text import TextTokenizer
from cogvideo.training import metrics, trainer
from cogvideo.training.launch import ONE_PROCESS, prepare_environment
from cogvideo.worlds.digits import probes
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import write_bundle
from tests.helpers.packs import GOLDEN
from tests.helpers.superres import HIGH, LOW, TINY_DIRECT, superres_settings, write_superres
from tests.helpers.training import prepare_data, read_metrics, settings

NOT_COMPARED = (
    re.compile(r"run/origin\.json"),  # when and where a run started
    re.compile(r"run/curves\.png"),  # drawn from metrics.jsonl, times included
)
"""Files that rightly differ from run to run."""
IMPORTED_LATE = (
    "av",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.GifImagePlugin",
    "PIL.PngImagePlugin",
    "pybullet",
    "sentencepiece",
    "scipy.ndimage",
    "sklearn.cluster",
    "sklearn.datasets",
    "sklearn.svm",
    "torch._dynamo",
)
"""Modules that the package imports inside functions and that take long to import."""
TASKS = ("tokenizer", "image", "sequential", "interpolation", "superres")


@dataclass(frozen=True)
class Command:
    """A command to try."""

    words: str
    """`{scene}` is the folder of `make_scene`; output goes into the current folder."""
    again: str = ""
    """Option that continues after an interruption."""
    world: int = 1
    """Number of processes."""
    pushes: bool = False
    """Whether it writes to a hub, not to a disk."""


SAMPLING = "num_clusters=32 --model {scene}/bundle --out out"
CAPTIONS = "prepare --captions {scene}/videos/captions.jsonl --out out videos_per_shard=2 workers=1"
COMMANDS = {
    "digits": Command("digits --count 2 --out out"),
    "worlds": Command("worlds bodies --count 1 --pixels 64 --out out"),
    "prepare-frames": Command(f"{CAPTIONS} --frames frame_pixels=16 frames_per_video=3"),
    "prepare-tokens": Command(f"{CAPTIONS} --tokenizer {{scene}}/bundle/image_tokenizer frame_pixels=16"),
    "prepare-pairs": Command(
        f"{CAPTIONS} --tokenizer {{scene}}/bundle/image_tokenizer frame_pixels=48 low_res_pixels=16 frames_per_video=3"
    ),
    "prepare-tokens-2": Command(f"{CAPTIONS} --tokenizer {{scene}}/bundle/image_tokenizer frame_pixels=16", world=2),
    "vocabulary": Command(
        "vocabulary --captions {scene}/videos/captions.jsonl --tokenizer {scene}/bundle/image_tokenizer --pieces 400 "
        "--out out.model"
    ),
    **{f"train-{task}": Command(f"train --config {{scene}}/{task}.yaml", "--resume") for task in TASKS},
    **{f"train-{task}-2": Command(f"train --config {{scene}}/{task}.yaml", "--resume", 2) for task in TASKS},
    "bundle": Command(
        "bundle --text {scene}/bundle/text.model --tokenizer {scene}/bundle/image_tokenizer "
        "--trunk {scene}/bundle/trunk --sequential {scene}/bundle/sequential "
        "--interpolation {scene}/bundle/interpolation --clusters 16 --out out"
    ),
    "sample": Command(f"sample 'a red one' 'a green one' rounds=1 clips_at_once=1 {SAMPLING}", "--resume"),
    "sample-2": Command(f"sample 'a red one' 'a green one' rounds=0 clips_at_once=1 {SAMPLING}", "--resume", 2),
    "interpolate": Command(f"interpolate {{scene}}/clips rounds=1 clips_at_once=1 {SAMPLING}", "--resume"),
    "upsample": Command(
        "upsample {scene}/clips --direct {scene}/direct --iterative {scene}/iterative frames_at_once=3 "
        "--model {scene}/bundle --out out",
        "--resume",
    ),
    "merge": Command("merge {scene}/bundle/sequential --adapter {scene}/adapter:0.5 --out out"),
    "extend": Command("extend {scene}/bundle --num-frames 7 --out out"),
    "convert-from": Command(
        "convert --from {scene}/sat --to out vocab.num_image_tokens=200 "
        "vocab.pad=200 vocab.newline=201 vocab.start_of_image=202"
    ),
    "convert-to": Command("convert --from {scene}/bundle/sequential --to out --to-sat"),
    "eval": Command("eval digits --model {scene}/digits-bundle --num-prompts 2 num_clusters=32 --json out.json"),
    "eval-local": Command(
        "eval local --generated {scene}/clips --real {scene}/videos --side 16 --frames 2 --cache cache --json out.json "
        "--report out.html"
    ),
    "eval-model": Command(
        "eval local --model {scene}/bundle --prompts {scene}/prompts.txt --real {scene}/videos --side 16 --frames 2 "
        "--cache cache --json out.json rounds=0 clips_at_once=1 num_clusters=32"
    ),
    "score": Command(
        "score --model {scene}/bundle/sequential --rows {scene}/scored --text-tokenizer {scene}/bundle/text.model "
        "--out out.safetensors --batch 1"
    ),
    "push": Command("push {scene}/bundle someone/clips --license mit --yes", pushes=True),
}


def make_scene(folder: Path) -> None:
    """Write the commands' inputs, and training configs that name them by the folder's final path, without suffix."""
    from cogvideo.cli.main import main

    def run(words: str) -> None:
        if main([word.format(scene=folder) for word in words.split()]):
            raise RuntimeError(f"cogvideo {words}")

    bundle = write_bundle(folder / "bundle", frame_side=LOW)
    write_bundle(folder / "digits-bundle", frame_side=5, num_layers=1)
    vocabulary = TextTokenizer.load(bundle / "text.model").vocabulary
    for method in ("direct", "iterative"):
        config = replace(
            TINY_DIRECT,
            method=method,
            text_len=16,
            low_res_side=LOW,
            high_res_side=HIGH,
            num_positions=64,
            low_res_position_start=33,
            vocabulary=vocabulary,
        )
        write_superres(folder / method, config)
    base = bundle / "sequential"
    record = Base(model="sequential", sha256=fingerprint(load_checkpoint(base)), step=1)
    write_adapter(folder / "adapter", load_model(base), record, targets=["spatial"])
    shutil.copytree(GOLDEN / "sat-stage1", folder / "sat")
    (folder / "prompts.txt").write_text("a red one\na green one\n", encoding="utf-8")
    run("digits --count 6 --pixels 80 --out {scene}/videos")
    for name, out in (("prepare-pairs", "pairs"), ("prepare-tokens", "scored")):
        run(COMMANDS[name].words.replace("--out out", f"--out {{scene}}/{out}"))
    run(f"sample one two rounds=0 {SAMPLING}".replace("--out out", "--out {scene}/clips"))
    prepare_data(folder / "data")
    final, often = folder.with_suffix(""), {"log": {"save_every": 2, "keep_last": 2}}
    for task in TASKS:
        if task == "superres":
            config = superres_settings(final, Path("run"), **often)
        else:
            config = settings(final / "data", Path("run"), task, **often)
        config_file = folder / f"{task}.yaml"
        config_file.write_text(dump_yaml(config), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """The files to compare, by name; metrics without what depends on the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not any(pattern.fullmatch(name) for pattern in NOT_COMPARED):
            metrics = path.name == "metrics.jsonl"
            found[name] = json.dumps(read_metrics(path.parent)).encode() if metrics else path.read_bytes()
    return found


def warm_up() -> None:
    """Import what commands import, and fit the digit classifier, which takes as long, so that forks need not.

    From then on, curves.png has no lines: drawing them takes half of a training run. Nothing here starts threads.
    """
    import cogvideo

    before = dict(os.environ)
    prepare_environment()
    for module in pkgutil.walk_packages(cogvideo.__path__, "cogvideo."):
        if not re.search(r"__main__|\.kernels|\.demo", module.name):
            importlib.import_module(module.name)
    for name in IMPORTED_LATE:
        with contextlib.suppress(ImportError):  # some belong to extras
            importlib.import_module(name)
    probes._digit_classifier()
    trainer.draw_curves = lambda records, path: metrics.draw_curves([], path)
    for name in ONE_PROCESS.keys() - before.keys():
        del os.environ[name]
