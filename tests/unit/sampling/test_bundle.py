"""Bundles: a shared trunk is held once, prompt formats travel with the weights, fingerprints."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvideo.checkpoint.adapter import Base, check_fingerprint, load_adapter, write_merged
from cogvideo.checkpoint.adapter import fingerprint as checkpoint_fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model, save_model
from cogvideo.cli.main import main
from cogvideo.config import from_dict, read_yaml, to_dict
from cogvideo.dtypes import WeightName
from cogvideo.files import write_json
from cogvideo.model.transformer import is_temporal
from cogvideo.sampling.assemble import Parts, assemble_bundle
from cogvideo.sampling.bundle import (
    BundleConfig,
    fingerprint,
    load_sample_config,
    load_upsample_config,
    open_bundle,
    weights_for,
)
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sequence.prompt import PromptFormat
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import write_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle")


def test_a_frozen_trunk_is_held_once(folder: Path, tmp_path: Path) -> None:
    """A stage that was trained with the trunk frozen uses the trunk's own tensors."""
    apart, shared = open_bundle(folder), tmp_path / "shared"
    shutil.copytree(folder, shared)
    shutil.rmtree(shared / "interpolation")
    assert apart.interpolation is not None
    stage = apart.interpolation
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if not is_temporal(name):
                parameter.copy_(apart.trunk.state_dict()[name])
    save_model(shared / "interpolation", stage, trunk=shared / "trunk")
    together = open_bundle(shared)
    assert together.interpolation is not None
    trunk = dict(together.trunk.named_parameters())
    for name, parameter in together.interpolation.named_parameters():
        assert (trunk.get(name) is parameter) != is_temporal(name), name
        assert torch.equal(parameter, stage.state_dict()[name]) and parameter.dtype == torch.float32
    assert together.sequential.word_embeddings is not together.trunk.word_embeddings, "it was saved whole"


@pytest.mark.parametrize("weights", ["bf16", "fp16", "int8", "int4"])
def test_low_precision_weights(folder: Path, weights: WeightName) -> None:
    """The matrices of all models have that type, and clips can be sampled."""
    bundle = open_bundle(folder, weights)
    stored = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8, "int4": torch.uint8}[weights]
    for model in (bundle.trunk, bundle.sequential, bundle.interpolation):
        assert model is not None and model.word_embeddings.weight.dtype == stored
        assert model.layers[0].attention.dense.weight.dtype == stored
        assert model.final_layernorm.weight.dtype == torch.float32
    config = SampleConfig(rounds=1, num_clusters=32, weights=weights)
    tokens = Pipeline.load(folder, SampleConfig(weights=weights)).sample(["a red one"], config)
    assert tokens.shape == (1, 9, 4) and tokens.min() >= 0 and tokens.max() < 32


def test_float8_on_a_cpu_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^weights=float8 is for GPUs; on a CPU choose weights=int8"):
        open_bundle(folder, "float8")


def test_the_prompt_format_of_training_travels_with_the_weights(folder: Path, tmp_path: Path) -> None:
    trained = PromptFormat(video_suffix=" film")
    for name in ("trunk", "sequential", "interpolation"):
        extra = {"prompt": to_dict(trained)} if name == "sequential" else {}
        save_model(tmp_path / name, load_model(folder / name), extra=extra)
    models = {name: tmp_path / name for name in ("trunk", "sequential", "interpolation")}
    parts = Parts(folder / "text.model", folder / "image_tokenizer", **models)
    how = {"config": BundleConfig(), "clusters": 4, "dtype": torch.float32}
    assemble_bundle(tmp_path / "bundle", parts, **how)
    assert open_bundle(tmp_path / "bundle").config.prompt == trained
    bundled = {name: tmp_path / "bundle" / name for name in models}
    assemble_bundle(tmp_path / "again", replace(parts, **bundled), **how)
    assert open_bundle(tmp_path / "again").config.prompt == trained
    how["config"] = BundleConfig(prompt=trained)
    save_model(tmp_path / "unknown", load_model(folder / "sequential"))
    assemble_bundle(tmp_path / "told", replace(parts, sequential=tmp_path / "unknown"), **how)
    assert from_dict(PromptFormat, load_checkpoint(tmp_path / "told/trunk").extra["prompt"]) == trained
    save_model(tmp_path / "trunk", load_model(folder / "trunk"), extra={"prompt": to_dict(PromptFormat())})
    with pytest.raises(ValueError, match="trunk and sequential were trained with different prompt formats"):
        assemble_bundle(tmp_path / "other", parts, **how)
    assert not (tmp_path / "other").exists()


def test_example_prompts_are_kept_in_the_bundle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n\n一个红色的球\n", encoding="utf-8")
    words = ["bundle", "--text", folder / "text.model", "--tokenizer", folder / "image_tokenizer", "--clusters", "4"]
    words += [word for name in ("trunk", "sequential", "interpolation") for word in (f"--{name}", folder / name)]
    words += ["--examples", tmp_path / "prompts.txt", "--out", tmp_path / "bundle"]
    assert main([str(word) for word in words]) == 0
    assert open_bundle(tmp_path / "bundle").config.examples == ["a red ball", "一个红色的球"]
    assert open_bundle(folder).config.examples == []


def test_a_bundle_without_stage_2_is_sampled_without_rounds(folder: Path, tmp_path: Path) -> None:
    parts = Parts(folder / "text.model", folder / "image_tokenizer", folder / "trunk", folder / "sequential")
    how = {"config": BundleConfig(), "clusters": 4, "dtype": torch.float32}
    assemble_bundle(tmp_path / "bundle", parts, **how)
    config = load_sample_config(tmp_path / "bundle", [], ["num_clusters=32"])
    pipeline = Pipeline.load(tmp_path / "bundle", config)
    assert config == SampleConfig(rounds=0, num_clusters=32) and pipeline.interpolation is None
    assert pipeline.sample(["a red one"], config).shape == (1, 5, 4)
    (tmp_path / "sampling.yaml").write_text("seconds: 2\n")
    with pytest.raises(ValueError, match=r"sampling.yaml has rounds=3 of .* give --interpolation, or set rounds: 0$"):
        assemble_bundle(tmp_path / "other", replace(parts, sampling=tmp_path / "sampling.yaml"), **how)
    assert not (tmp_path / "other").exists()
    (tmp_path / "sampling.yaml").write_text("seconds: 2\nrounds: 0\n")
    assemble_bundle(tmp_path / "other", replace(parts, sampling=tmp_path / "sampling.yaml"), **how)
    assert load_sample_config(tmp_path / "other", [], []).seconds == 2


def test_a_bundles_own_settings_say_how_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    parts = Parts(folder / "text.model", folder / "image_tokenizer", folder / "trunk", folder / "sequential")
    (tmp_path / "sampling.yaml").write_text("weights: int8\nrounds: 0\n")
    parts = replace(parts, sampling=tmp_path / "sampling.yaml")
    assemble_bundle(tmp_path / "bundle", parts, config=BundleConfig(), clusters=4, dtype=torch.float32)
    for config, is_int8 in ((None, True), (SampleConfig(weights="fp32"), False)):
        model = Pipeline.load(tmp_path / "bundle", config).sequential
        assert (torch.int8 in {tensor.dtype for tensor in model.state_dict().values()}) is is_int8


def test_only_changed_settings_of_super_resolution_are_stored(folder: Path, tmp_path: Path) -> None:
    """The others stay out, since super-resolution then has the clips' seed, weights and device."""
    (tmp_path / "sampling.yaml").write_text("rounds: 0\nweights: fp32\nupsample: {noise: shared, top_k_clusters: 6}\n")
    parts = Parts(folder / "text.model", folder / "image_tokenizer", folder / "trunk", folder / "sequential")
    parts = replace(parts, sampling=tmp_path / "sampling.yaml")
    assemble_bundle(tmp_path / "bundle", parts, config=BundleConfig(), clusters=4, dtype=torch.float32)
    assert read_yaml(tmp_path / "bundle/sampling.yaml")["upsample"] == {"noise": "shared"}
    assert load_upsample_config(tmp_path / "bundle", [], []).noise == "shared"
    assert load_sample_config(tmp_path / "bundle", [], []) == SampleConfig(rounds=0, weights="fp32")


def test_fingerprints(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert fingerprint(copy) == fingerprint(folder)
    (copy / "sampling.yaml").write_text("seed: 3\n")
    assert fingerprint(copy) == fingerprint(folder), "settings are not weights"
    write_json(copy / "bundle.json", {"examples": ["a red ball"]})
    assert fingerprint(copy) == fingerprint(folder), "nor are example prompts"
    found = set()
    for examples in ({}, {"examples": []}, {"examples": ["a red ball"]}):
        write_json(copy / "bundle.json", {"prompt": to_dict(PromptFormat()), **examples})
        found.add(fingerprint(copy))
    write_json(copy / "bundle.json", {"prompt": to_dict(PromptFormat(video_suffix=" film"))})
    assert len(found) == 1 and fingerprint(copy) not in {fingerprint(folder), *found}
    for name in ("text.model", "interpolation/manifest.json"):
        before = fingerprint(copy)
        with open(copy / name, "ab") as file:
            file.write(b" ")
        assert fingerprint(copy) != before


def test_models_are_sampled_in_bf16_on_a_gpu_unless_told_otherwise() -> None:
    assert weights_for(torch.device("cuda"), "auto") == "bf16"
    assert weights_for(torch.device("cpu"), "auto") == "fp32"
    assert weights_for(torch.device("cuda"), "int8") == "int8"


def test_merged_updates_that_a_bundle_would_round_away_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(folder / "sequential", dtype=torch.bfloat16)
    save_model(tmp_path / "base", model)
    record = Base(model="sequential", sha256=checkpoint_fingerprint(load_checkpoint(tmp_path / "base")), step=0)
    adapter = write_adapter(tmp_path / "adapter", model, record)
    words = ["merge", str(tmp_path / "base"), "--adapter", f"{adapter}:1e-4", "--out"]
    assert main([*words, str(tmp_path / "merged")]) == 0 and "away" not in capsys.readouterr().err
    assert main([*words, str(tmp_path / "rounded"), "--dtype", "bf16"]) == 0
    assert "of the update; use --dtype fp32 to keep it" in capsys.readouterr().err
    parts = {"text": folder / "text.model", "tokenizer": folder / "image_tokenizer", "trunk": folder / "trunk"}
    parts["sequential"] = tmp_path / "merged"
    words = ["bundle", "--clusters", "4", *(str(word) for name in parts for word in (f"--{name}", parts[name]))]
    assert main([*words, "--out", str(tmp_path / "bf16")]) == 0
    assert "of what adapters added; use --dtype fp32 to keep it" in capsys.readouterr().err
    assert main([*words, "--dtype", "fp32", "--out", str(tmp_path / "fp32")]) == 0
    assert "away" not in capsys.readouterr().err


def test_an_fp16_bundle_takes_adapters_trained_beside_its_source(folder: Path, tmp_path: Path) -> None:
    """fp16 has fewer exponents than bfloat16, in which fingerprints are: small numbers become others."""
    model = load_model(folder / "sequential")
    with torch.no_grad():
        model.layers[0].mlp.dense_h_to_4h.weight[0] = 1e-7
    save_model(tmp_path / "sequential", model)
    source = load_checkpoint(tmp_path / "sequential")
    known = checkpoint_fingerprint(source)
    adapter = load_adapter(write_adapter(tmp_path / "adapter", model, Base(model="sequential", sha256=known, step=0)))
    parts = Parts(folder / "text.model", folder / "image_tokenizer", folder / "trunk", tmp_path / "sequential")
    for name in ("bundle", "again"):
        assemble_bundle(tmp_path / name, parts, config=BundleConfig(), clusters=4, dtype=torch.float16)
        parts = replace(parts, sequential=tmp_path / name / "sequential")
    bundled = load_checkpoint(tmp_path / "again/sequential")
    check_fingerprint(adapter, bundled)
    write_merged(tmp_path / "merged", bundled, model.config, [(adapter, 1.0)])
    with pytest.raises(ValueError, match="was trained on different base weights"):
        check_fingerprint(adapter, load_checkpoint(tmp_path / "merged"))
