"""Low-rank adapters end to end: trained, resumed and exported; merged or kept apart they are one function."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogvideo.checkpoint.adapter import Base, fingerprint, load_adapter
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model
from cogvideo.cli.main import main
from cogvideo.files import read_json
from cogvideo.training.launch import train
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.ranks import run as run_ranks
from tests.helpers.ranks import train_words
from tests.helpers.training import prepare_data, read_metrics, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def bases(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each task, after one step."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for task in ("image", "sequential", "interpolation"):
        found[task] = train_base(data, folder / task, task)
    return found


def train_base(data: Path, run_dir: Path, task: str) -> Path:
    train(settings(data, run_dir, task, train={"steps": 1}))
    return run_dir / "export" / {"image": "trunk"}.get(task, task)


def groups(base: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    lora = {"rank": 2, "alpha": 8.0, "dropout": 0.1} | changes.pop("lora", {})
    return {"init": {"checkpoint": base} | changes.pop("init", {}), "lora": lora, **changes}


INT8 = {"init": {"trunk_weights": "int8"}}
LOW = {"train": {"dtype": "bf16", "weights": "dtype"}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 1": ("sequential", {}),
    "stage 1 beside int8": ("sequential", INT8),
    "stage 1 beside a frozen trunk": ("sequential", {"init": {"freeze_trunk": True}}),
    "stage 2, rsLoRA": ("interpolation", {"lora": {"rslora": True}}),
    "trunk beside int8": ("image", INT8 | LOW | {"deepspeed": {"stage": 1}}),
    "all matrices": ("sequential", {"lora": {"targets": ["spatial", "temporal", "mlp", "embeddings"]}}),
    "zero 2": ("sequential", LOW | {"deepspeed": {"stage": 2}}),
    "zero 3": ("sequential", {"deepspeed": {"stage": 3}}),
    "zero 3, all matrices": (
        "sequential",
        LOW | {"deepspeed": {"stage": 3}, "lora": {"targets": ["temporal", "embeddings"]}},
    ),
    "recomputed": ("sequential", {"train": {"recompute": "layer"}}),
    "fp16": ("sequential", {"train": {"dtype": "fp16", "weights": "dtype"}}),
    "averaged": ("sequential", {"train": {"ema_decay": 0.9}}),
}


@pytest.mark.usefixtures("fp16_on_cpu")
@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_bitwise_exact_and_only_adapters_are_saved(
    variant: str, data: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    task, changes = VARIANTS[variant]
    chosen = groups(bases[task], **changes)
    whole, parts = (settings(data, tmp_path / name, task, **chosen) for name in ("whole", "parts"))
    train(whole)
    train(settings(data, tmp_path / "parts", task, **chosen | {"train": chosen.get("train", {}) | {"stop_at": 3}}))
    train(parts, resume=True)
    assert read_metrics(whole.run_dir) == read_metrics(parts.run_dir)
    losses = [line["loss"] for line in read_metrics(whole.run_dir)]
    assert losses[0] != losses[-1]
    exports = [config.run_dir / "export" / "adapter" for config in (whole, parts)]
    assert digest(exports[0]) == digest(exports[1])
    assert [path.name for path in (whole.run_dir / "export").iterdir()] == ["adapter"]
    manifest = read_json(whole.run_dir / "checkpoints/step_00000006/manifest.json")
    assert all(".lora." in name for name in manifest["tensors"])
    adapter = load_adapter(exports[0])
    assert adapter.base is not None and adapter.base["step"] == 6
    assert all(factors.b.any() and factors.a.any() for factors in adapter.factors.values())
    has_tables = "embeddings" in whole.lora.targets
    assert ("word_embeddings" in adapter.factors) == has_tables


@pytest.mark.slow
def test_resuming_is_bitwise_exact_in_two_processes(data: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """Under ZeRO 2 in bf16, where adapters are partitioned and the weights beside them are not."""

    def run(name: str, *words: str, **train_settings: Any) -> None:
        chosen = groups(bases["sequential"], **LOW, deepspeed={"stage": 2})
        chosen["train"] = LOW["train"] | train_settings
        config = settings(data, tmp_path / name, "sequential", **chosen, log={"every": 2})
        run_ranks(train_words(config, *words), 2, tmp_path / "stderr")

    run("whole")
    run("parts", stop_at=3)
    run("parts", "--resume")
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    assert digest(tmp_path / "whole/export/adapter") == digest(tmp_path / "parts/export/adapter")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_without_steps_the_loss_is_the_bases_own(data: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter starts as no change: the first loss of a run is that of training all weights."""
    first, base = [], bases["sequential"]
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0}
    for name, chosen in (("whole", {"init": {"checkpoint": base}}), ("lora", groups(base, lora={"dropout": 0.0}))):
        run = settings(data, tmp_path / name, train={"steps": 1}, model=no_dropout, **chosen)
        train(run)
        first.append(read_metrics(run.run_dir)[0]["loss"])
    assert first[0] == first[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"targets": ["high_res"]}}, "no matrix 'high_res'"),
        ({"lora": {"rank": -1}}, r"lora\.rank=-1"),
        ({"lora": {"dropout": 1.0}}, r"lora\.dropout"),
        ({"lora": {"alpha": 0.0}}, r"lora\.alpha"),
        ({"init": {"checkpoint": None}}, r"lora\.rank .*init\.checkpoint"),
    ],
)
def test_contradictions_are_refused(
    changes: dict[str, Any], message: str, data: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(data, tmp_path / "run", **groups(bases["sequential"], **changes)))


@pytest.mark.parametrize(
    ("task", "base", "temporal"),
    [
        ("sequential", "image", "qkv"),
        ("image", "sequential", "qkv"),
        ("interpolation", "sequential", "copy"),
    ],
)
def test_a_checkpoint_of_another_task_is_refused(
    task: str, base: str, temporal: str, data: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^init\.checkpoint: .* is for another task") as caught:
        train(settings(data, tmp_path / "run", task, **groups(bases[base], init={"temporal": temporal})))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_resuming_beside_another_base_is_refused(data: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    other = train_base(data, tmp_path / "other", "sequential")
    chosen = groups(bases["sequential"])
    train(settings(data, tmp_path / "run", **chosen | {"train": {"stop_at": 1}}))
    changed = load_checkpoint(other).tensor("final_layernorm.bias")
    assert torch.equal(changed, load_checkpoint(bases["sequential"]).tensor("final_layernorm.bias"))
    second = settings(data, tmp_path / "second", train={"steps": 2}, init={"checkpoint": other})
    train(second)
    with pytest.raises(ValueError, match="other frozen weights"):
        train(settings(data, tmp_path / "run", **groups(second.run_dir / "export/sequential")), resume=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def adapter(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the bundle's stage 1."""
    base = bundle / "sequential"
    record = Base(model="sequential", sha256=fingerprint(load_checkpoint(base)), step=1)
    return write_adapter(
        tmp_path_factory.mktemp("adapter") / "adapter", load_model(base), record, targets=("spatial", "embeddings")
    )


SETTINGS = ["rounds=0", "num_clusters=8", "key_frames.guidance_scale=null"]


def sampled(bundle: Path, out: Path, *words: str) -> torch.Tensor:
    assert main(["sample", CAPTIONS[0], "--model", str(bundle), "--out", str(out), *SETTINGS, *words]) == 0
    return load_file(out / "tokens.safetensors")["tokens"]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_sampling_with_an_adapter_is_sampling_from_the_merged_model(
    weights: str, bundle: Path, adapter: Path, tmp_path: Path
) -> None:
    plain = sampled(bundle, tmp_path / "plain", f"weights={weights}")
    words = ["--adapter", f"{adapter}:0.5", "--adapter", f"{adapter}:0.5", f"weights={weights}"]
    found = sampled(bundle, tmp_path / "adapter", *words)
    apart = sampled(bundle, tmp_path / "apart", *words, "--adapters-apart")
    shutil.copytree(bundle, tmp_path / "bundle")
    out = tmp_path / "bundle/sequential"
    assert main(["merge", str(bundle / "sequential"), *words[:4], "--out", str(out), "--overwrite"]) == 0
    assert torch.equal(found, sampled(tmp_path / "bundle", tmp_path / "merged", f"weights={weights}"))
    assert not torch.equal(found, plain)
    if weights == "fp32":
        assert torch.equal(found, apart)


def test_a_run_is_not_resumed_with_another_adapter(
    bundle: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled(bundle, tmp_path / "out", "--adapter", str(adapter))
    words = ["sample", CAPTIONS[0], "--model", str(bundle), "--out", str(tmp_path / "out"), "--resume", *SETTINGS]
    assert main([*words, "--adapter", str(adapter)]) == 0
    assert main([*words, "--adapter", f"{adapter}:0.5"]) == 2
    assert "another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "{bundle}", "--adapter", "{adapter}", "--out", "{out}"], "is a bundle; give one of its models"),
        (["merge", "{bundle}/sequential", "--adapter", "{bundle}", "--out", "{out}"], "is not an adapter"),
        (
            ["merge", "{bundle}/trunk", "--adapter", "{adapter}", "--out", "{out}"],
            "for a sequential model, got trunk",
        ),
        (["merge", "{bundle}/sequential", "--adapter", "{adapter}", "--out", "{bundle}"], "would replace what is read"),
        (["merge", "{bundle}/sequential", "--adapter", "{adapter}:nan", "--out", "{out}"], "scale nan"),
        (["sample", "x", "--model", "{bundle}", "--adapter", "{bundle}", "--out", "{out}"], "is not an adapter"),
        (["sample", "x", "--adapter", "{adapter}", "--out", "{out}"], "does not fit sequential"),
    ],
)
def test_misfits_are_one_line_and_nothing_is_written(
    words: list[str],
    message: str,
    bundle: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main([word.format(bundle=bundle, adapter=adapter, out=out) for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not out.exists()
