"""Adapters on disk: read as written, by PEFT too; damaged and hostile ones are refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideo.checkpoint.adapter import (
    Base,
    check_base,
    check_fingerprint,
    fingerprint,
    load_adapter,
    lost_share,
    write_merged,
)
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model, save_model
from cogvideo.model.lora import matrix_shapes
from cogvideo.model.transformer import CogVideoTransformer
from tests.helpers.adapters import write_adapter
from tests.helpers.models import tiny_batch, tiny_config, tiny_model

TARGETS = ("spatial", "temporal", "mlp", "embeddings")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, tiny_model(tiny_config()))
    return folder


@pytest.fixture
def adapted(base: Path, tmp_path: Path) -> tuple[CogVideoTransformer, Path]:
    """A model with an adapter beside its weights, and the adapter's folder."""
    model = load_model(base)
    record = Base(model="sequential", sha256=fingerprint(load_checkpoint(base)), step=3)
    return model, write_adapter(tmp_path / "adapter", model, record, targets=TARGETS)


def test_merging_gives_the_function_of_the_adapter_beside_the_weights(
    base: Path, adapted: tuple[CogVideoTransformer, Path], tmp_path: Path
) -> None:
    model, folder = adapted
    checkpoint = load_checkpoint(base)
    write_merged(tmp_path / "merged", checkpoint, model.config, [(load_adapter(folder), 1.0)])
    merged, batch = load_model(tmp_path / "merged"), tiny_batch(model.config)
    assert torch.allclose(merged.token_losses(batch), model.token_losses(batch), atol=1e-4)
    assert load_checkpoint(tmp_path / "merged").extra["merged"] == [{"adapter": "adapter", "weight": 1.0}]
    assert lost_share(load_checkpoint(tmp_path / "merged").extra, torch.bfloat16) < 0.01, "the update is large"
    half = load_adapter(folder)
    write_merged(tmp_path / "halves", checkpoint, model.config, [(half, 0.5), (half, 0.5)])
    assert torch.allclose(load_model(tmp_path / "halves").token_losses(batch), model.token_losses(batch), atol=1e-4)


def test_merging_keeps_small_updates_of_a_bf16_base(base: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "bf16", load_model(base, dtype=torch.bfloat16))
    checkpoint, model = load_checkpoint(tmp_path / "bf16"), load_model(base)
    record = Base(model="sequential", sha256=fingerprint(checkpoint), step=0)
    adapter = load_adapter(write_adapter(tmp_path / "adapter", model, record))
    small = [(adapter, 1e-3)]
    write_merged(tmp_path / "merged", checkpoint, model.config, small)
    merged = load_checkpoint(tmp_path / "merged")
    layer = next(iter(adapter.factors))
    expected = checkpoint.tensor(f"{layer}.weight").float() + adapter.update(layer, 1e-3)
    assert torch.equal(merged.tensor(f"{layer}.weight"), expected)
    assert lost_share(merged.extra, torch.float32) == 0.0 and lost_share(merged.extra, torch.bfloat16) > 0.1
    write_merged(tmp_path / "rounded", checkpoint, model.config, small, dtype=torch.bfloat16)
    rounded = load_checkpoint(tmp_path / "rounded")
    assert {info.dtype for info in rounded.infos.values()} == {torch.bfloat16}
    kept, lost = 0.0, lost_share(merged.extra, torch.bfloat16)
    total = 0.0
    for name in adapter.factors:
        update = adapter.update(name, 1e-3)
        change = rounded.tensor(f"{name}.weight").float() - checkpoint.tensor(f"{name}.weight").float()
        kept, total = kept + float((change * update).sum()), total + float(update.square().sum())
    assert 1 - kept / total == pytest.approx(lost, abs=0.002)


@pytest.mark.parametrize("recorded", [None, [], {"bf16": "much"}, {}])
def test_a_record_of_lost_shares_is_not_trusted(recorded: object) -> None:
    assert lost_share({"lost_by_rounding": recorded}, torch.bfloat16) == 0.0


def test_a_fingerprint_survives_another_type_and_no_training(base: Path, tmp_path: Path) -> None:
    known = fingerprint(load_checkpoint(base))
    save_model(tmp_path / "bf16", load_model(base, dtype=torch.bfloat16))
    assert fingerprint(load_checkpoint(tmp_path / "bf16")) == known
    model = load_model(base)
    with torch.no_grad():
        model.layers[1].mlp.dense_h_to_4h.weight[0, 0] += 1
    save_model(tmp_path / "trained", model)
    assert fingerprint(load_checkpoint(tmp_path / "trained")) != known


def test_adapters_of_other_models_are_refused(
    base: Path, adapted: tuple[CogVideoTransformer, Path], tmp_path: Path
) -> None:
    adapter = load_adapter(adapted[1])
    shapes = matrix_shapes({name: info.shape for name, info in load_checkpoint(base).infos.items()})
    check_base(adapter, "sequential", shapes)
    with pytest.raises(ValueError, match="is for a sequential model, got interpolation"):
        check_base(adapter, "interpolation", shapes)
    with pytest.raises(ValueError, match=r"has no matrix layers\.0\.attention\.dense"):
        check_base(adapter, "sequential", {})
    with pytest.raises(ValueError, match="a base model of a different size"):
        check_base(adapter, "sequential", {name: (rows, columns + 1) for name, (rows, columns) in shapes.items()})
    save_model(tmp_path / "other", tiny_model(tiny_config(), seed=7))
    with pytest.raises(ValueError, match=r"was trained on different base weights .*remove .*base\.json"):
        check_fingerprint(adapter, load_checkpoint(tmp_path / "other"))


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"r": 0}, "r:"),
        ({"r": 10**6}, "r:"),
        ({"r": 3}, "expected a matrix of rank 3"),
        ({"r": 2.0}, "r:"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"bias": "all"}, "bias="),
        ({"modules_to_save": ["mlp"]}, "modules_to_save"),
        ({"rank_pattern": {"mlp": 4}}, "rank_pattern"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    changes: dict[str, Any], message: str, adapted: tuple[CogVideoTransformer, Path]
) -> None:
    folder = adapted[1]
    change_settings(folder, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        load_adapter(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.../../etc.lora_A.weight"] = tensors.pop(min(tensors))


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)][0, 0] = float("nan")


def flatten(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)].flatten()


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)].to(torch.int8)


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.layers.0.mlp.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename, "not a LoRA factor of a weight matrix"),
        (drop, "only one of the two factors"),
        (poison, "NaN or infinity"),
        (flatten, "expected a matrix of rank 2"),
        (narrow, "expected a matrix of rank 2"),
        (add, "not a LoRA factor of a weight matrix"),
        (dict.clear, "no adapter"),
    ],
)
def test_tensors_that_cannot_be_used_are_refused(
    damage: Any, message: str, adapted: tuple[CogVideoTransformer, Path]
) -> None:
    path = adapted[1] / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as raised:
        load_adapter(adapted[1])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_files_that_are_cut_or_missing_are_refused(adapted: tuple[CogVideoTransformer, Path]) -> None:
    folder = adapted[1]
    weights, record = folder / "adapter_model.safetensors", folder / "base.json"
    record.write_text('{"format": 1, "model": "sequential", "sha256": 7, "step": 0}')
    with pytest.raises(ValueError, match="sha256"):
        load_adapter(folder)
    record.unlink()
    assert load_adapter(folder).base is None
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        load_adapter(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"is not an adapter, it has no adapter_model\.safetensors"):
        load_adapter(folder)


def test_peft_reads_ours_and_we_read_its(base: Path, adapted: tuple[CogVideoTransformer, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra [lora] compares files with PEFT's own")
    ours, folder = adapted
    batch = tiny_batch(ours.config)
    theirs = peft.PeftModel.from_pretrained(load_model(base), folder)
    theirs.save_pretrained(tmp_path / "theirs")
    ours_again, found = load_adapter(folder), load_adapter(tmp_path / "theirs")
    assert found.base is None and found.scale == ours_again.scale
    assert "word_embeddings" in found.factors and found.factors.keys() == ours_again.factors.keys()
    for layer, factors in found.factors.items():
        assert all(map(torch.equal, factors, ours_again.factors[layer]))
    merged = theirs.merge_and_unload()
    assert torch.allclose(merged.token_losses(batch), ours.token_losses(batch), atol=1e-4)
