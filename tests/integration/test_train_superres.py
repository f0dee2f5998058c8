"""Super-resolution end to end on small random weights: pairs, bitwise resuming, exports that sample."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.cli.main import main
from cogvideo.config import from_dict
from cogvideo.data.dataset import ClipDataset, PairDataset
from cogvideo.data.loader import PairLoader
from cogvideo.media.video import read_video
from cogvideo.sampling.bundle import MODELS
from cogvideo.sampling.config import UpsampleConfig
from cogvideo.sampling.inputs import InputClips
from cogvideo.sampling.jobs import upsample_job
from cogvideo.sampling.pipeline import decode_frames
from cogvideo.sampling.publish import Publication
from cogvideo.sampling.superres import find_models, open_upsampler
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.tokenizers.text import TextTokenizer
from cogvideo.training.config import TrainConfig
from cogvideo.training.launch import train
from tests.helpers import ranks
from tests.helpers.bundles import NUM_CODES, write_bundle, write_image_tokenizer
from tests.helpers.superres import HIGH, LOW, superres_settings
from tests.helpers.training import read_metrics

SIZES = ["frame_pixels=48", "low_res_pixels=16", "frames_per_video=3"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    bundle = write_bundle(folder / "bundle", frame_side=LOW)
    assert main(["digits", "--out", str(folder / "videos"), "--count", "6", "--pixels", "80"]) == 0
    assert prepare(folder, folder / "pairs", *SIZES) == 0
    assert (bundle / "trunk").is_dir()
    return folder


@pytest.fixture(scope="module")
def large(scene: Path) -> Path:
    """An image tokenizer of large frames, and pairs made with it in large_pairs/."""
    tokenizer = write_image_tokenizer(scene / "large", seed=1)
    assert prepare(scene, scene / "large_pairs", *SIZES, "--high-res-tokenizer", str(tokenizer)) == 0
    return tokenizer


def prepare(scene: Path, out: Path, *words: str) -> int:
    captions, tokenizer = scene / "videos/captions.jsonl", scene / "bundle/image_tokenizer"
    return main(["prepare", "--captions", str(captions), "--tokenizer", str(tokenizer), "--out", str(out), *words])


def bundle_words(scene: Path, out: Path, *words: str) -> list[str]:
    parts = {"text": "text.model", "tokenizer": "image_tokenizer"} | {name: name for name in MODELS}
    own = [word for option, name in parts.items() for word in (f"--{option}", str(scene / "bundle" / name))]
    return ["bundle", "--out", str(out), "--clusters", "8", *own, *words]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_pairs_are_the_tokens_of_frames_at_both_sizes(scene: Path) -> None:
    pairs = PairDataset(scene / "pairs")
    assert (len(pairs), pairs.high_res_side, pairs.low_res_side, pairs.num_tokens) == (18, HIGH, LOW, NUM_CODES)
    fine, coarse = pairs.pairs(range(18))
    assert fine.shape == (18, HIGH**2) and coarse.shape == (18, LOW**2)
    tokenizer = ImageTokenizer.load(scene / "bundle/image_tokenizer")
    assert prepare(scene, scene / "clips", "frame_pixels=48", "clips.clip_seconds=[4]", "clips.num_frames=3") == 0
    clips = ClipDataset(scene / "clips")  # of the same frames: the first, the middle one and the last
    assert (clips.frames(range(6)).reshape(18, -1) == fine).mean() > 0.99  # batches differ in rounding
    frames, _ = read_video(scene / "videos/clips/000000.mp4", side=48)
    pixels = torch.from_numpy(frames[[0, 16, 32]]).permute(0, 3, 1, 2) / 255
    small = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    assert (tokenizer.encode(small).numpy() == coarse[:3]).mean() > 0.9
    assert pairs.texts([0, 3]) == [ClipDataset(scene / "clips").texts([i])[0][1] for i in (0, 1)]


def test_a_batch_is_a_function_of_its_step_and_covers_every_round(scene: Path) -> None:
    text = TextTokenizer.load(scene / "bundle/text.model")
    config = SuperresConfig(
        "iterative", 2, 16, 2, text_len=16, low_res_side=LOW, high_res_side=HIGH, num_positions=64,
        vocabulary=text.vocabulary,
    )  # fmt: skip
    whole = PairLoader(PairDataset(scene / "pairs"), text, config, 60)
    batch = whole.batch(3)
    assert batch.low_res.shape == (60, 0) and torch.equal(batch.text, whole.batch(3).text)
    assert set(batch.round.tolist()) == set(range(1, 7))
    assert torch.equal(batch.target_mask, round_masks(config)[batch.round - 1])
    parts = [PairLoader(whole.dataset, text, config, 60, rank=rank, world_size=2).batch(3) for rank in range(2)]
    assert torch.equal(torch.stack([part.high_res for part in parts], 1).flatten(0, 1), batch.high_res)
    assert torch.equal(torch.stack([part.round for part in parts], 1).flatten(), batch.round)
    first = PairDataset(scene / "pairs").texts(whole.rows(3)[:1])[0]
    assert batch.text[0][batch.text_mask[0]].tolist() == text.encode(first)[:16]


VARIANTS: dict[str, dict[str, Any]] = {
    "direct": {},
    "direct_zero2_bf16": {"train": {"dtype": "bf16", "weights": "dtype"}, "deepspeed": {"stage": 2}},
    "direct_int8": {"init": {"trunk_weights": "int8"}},
    "iterative": {},
    "iterative_bf16": {"train": {"dtype": "bf16"}},
    "iterative_zero1_recomputed": {"train": {"recompute": "layer"}, "deepspeed": {"stage": 1}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_bitwise_exact(variant: str, scene: Path, tmp_path: Path) -> None:
    method = variant.partition("_")[0]

    def run(name: str, **train_settings: Any) -> TrainConfig:
        groups = dict(VARIANTS[variant])
        base = superres_settings(scene, Path("x"), method)
        init = {"checkpoint": str(base.init.checkpoint), "freeze_trunk": base.init.freeze_trunk}
        groups["init"] = init | groups.get("init", {})
        groups["train"] = groups.get("train", {}) | train_settings
        return superres_settings(scene, tmp_path / name, method, **groups)

    train(run("whole"))
    train(run("parts", stop_at=3))
    train(run("parts"), resume=True)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    exports = [tmp_path / name / "export" / f"{method}_superres" for name in ("whole", "parts")]
    assert digest(exports[0]) == digest(exports[1])
    trunk, exported = load_checkpoint(scene / "bundle/trunk").tensors(), load_checkpoint(exports[0])
    changed = {name for name in trunk if not torch.equal(exported.tensor(name), trunk[name])}
    assert not changed if method == "direct" else len(changed) == len(trunk)
    assert (exported.trunk is not None) == (method == "direct")
    logged = {name for line in read_metrics(tmp_path / "whole") for name in line}
    assert {"loss", "grad_norm", "grad_norm/high_res" if method == "direct" else "loss/round_1"} <= logged


def test_a_checkpoint_of_the_same_model_is_loaded_whole(scene: Path, tmp_path: Path) -> None:
    for method in ("direct", "iterative"):
        train(superres_settings(scene, tmp_path / method, method, train={"steps": 2}))
        export = tmp_path / method / "export" / f"{method}_superres"
        init = {"checkpoint": str(export), "freeze_trunk": method == "direct"}
        again = superres_settings(
            scene, tmp_path / f"{method}_on", method, init=init, train={"steps": 1}, optimiser={"lr": 1e-9}
        )
        train(again)
        after = load_checkpoint(again.run_dir / "export" / f"{method}_superres").tensors()
        for name, tensor in load_checkpoint(export).tensors().items():
            torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_exports_work_in_a_bundle_and_previews_are_written(scene: Path, tmp_path: Path) -> None:
    words = bundle_words(scene, tmp_path / "bundle", "--dtype", "fp32")
    for method in ("direct", "iterative"):
        config = superres_settings(
            scene, tmp_path / method, method, train={"steps": 2}, log={"preview_every": 2},
            data={"validation": str(scene / "pairs"), "image_tokenizer": str(scene / "bundle/image_tokenizer")},
        )  # fmt: skip
        last = train(config)
        assert np.isfinite(last["loss"]) and (config.run_dir / "previews/step_00000002.png").stat().st_size > 1000
        assert any("validation/loss" in line for line in read_metrics(config.run_dir))
        words += [f"--{method}", str(config.run_dir / "export" / f"{method}_superres")]
    assert main(words) == 0
    assert load_checkpoint(tmp_path / "bundle/direct_superres").trunk is not None
    video = str(scene / "videos/clips/000000.mp4")
    asked = ["upsample", video, "--caption", "a red digit", "--fps", "1", "--model", str(tmp_path / "bundle")]
    assert main([*asked, "--out", str(tmp_path / "own")]) == 0
    given = [word for m in ("direct", "iterative") for word in (f"--{m}", str(tmp_path / m / f"export/{m}_superres"))]
    assert main([*asked, *given, "--out", str(tmp_path / "given")]) == 0
    drawn = [load_file(tmp_path / name / "tokens.safetensors")["tokens"] for name in ("own", "given")]
    assert drawn[0].shape[-1] == HIGH**2 and torch.equal(*drawn)


def test_large_frames_can_have_a_tokenizer_of_their_own(scene: Path, large: Path, tmp_path: Path) -> None:
    """Data, models and the bundle keep the two apart: tokens that are read are of one, drawn ones of the other."""
    pairs, one_tokenizer = PairDataset(scene / "large_pairs"), PairDataset(scene / "pairs")
    assert (pairs.high_res_side, pairs.low_res_side) == (HIGH, LOW)
    (fine, coarse), (other_fine, same_coarse) = pairs.pairs(range(6)), one_tokenizer.pairs(range(6))
    assert np.array_equal(coarse, same_coarse) and (fine != other_fine).mean() > 0.2
    words = ["--high-res-tokenizer", str(large)]
    for method in ("direct", "iterative"):
        data = {
            "path": str(scene / "large_pairs"),
            "image_tokenizer": str(scene / "bundle/image_tokenizer"),
            "high_res_tokenizer": str(large),
        }
        config = superres_settings(
            scene, tmp_path / method, method, train={"steps": 1}, log={"preview_every": 1}, data=data
        )
        train(config)
        assert (config.run_dir / "previews/step_00000001.png").stat().st_size > 1000
        words += [f"--{method}", str(config.run_dir / "export" / f"{method}_superres")]
    bundle = tmp_path / "bundle"
    assert main(bundle_words(scene, bundle, *words)) == 0
    stored = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {"high_res_clusters.npy", "high_res_tokenizer/model.safetensors"} <= stored
    assert Publication.of(bundle).weights.keys() == stored
    upsampler = open_upsampler(bundle, *find_models(bundle, None, None), UpsampleConfig())
    assert torch.equal(
        upsampler.image_tokenizer.codebook, ImageTokenizer.load(scene / "bundle/image_tokenizer").codebook
    )
    assert torch.equal(upsampler.high_res_tokenizer.codebook, ImageTokenizer.load(large).codebook)
    assert np.array_equal(upsampler.labels, np.load(bundle / "high_res_clusters.npy"))
    assert upsampler.labels.max() == 7
    labels = np.arange(32) // 2
    np.save(tmp_path / "labels.npy", labels)
    again = tmp_path / "again"
    assert main(bundle_words(scene, again, *words, "--high-res-clusters", str(tmp_path / "labels.npy"))) == 0
    assert np.array_equal(np.load(again / "high_res_clusters.npy"), labels)
    assert np.array_equal(np.load(again / "clusters.npy"), np.load(bundle / "clusters.npy"))
    given = InputClips(torch.from_numpy(coarse[:1])[None], 1.0)
    job = upsample_job(upsampler, given, "a red digit")
    drawn = next(job.stages([0])).tokens[0]
    assert np.array_equal(job.decode(drawn), decode_frames(ImageTokenizer.load(large), drawn))

    longer, larger = tmp_path / "longer", tmp_path / "larger"
    assert main(["extend", str(bundle), "--num-frames", "7", "--out", str(longer)]) == 0
    assert main(["extend", str(bundle), "--frame-side", "4", "--out", str(larger)]) == 0
    assert open_upsampler(longer, *find_models(longer, None, None), UpsampleConfig()).high_res_tokenizer
    assert not list(larger.glob("high_res*")) and Publication.of(larger)
    (bundle / "high_res_clusters.npy").write_bytes((bundle / "clusters.npy").read_bytes())
    with pytest.raises(ValueError, match=r"high_res_clusters\.npy is damaged"):
        open_upsampler(bundle, *find_models(bundle, None, None), UpsampleConfig())


def test_tokenizers_of_large_frames_that_do_not_fit_are_one_line(
    scene: Path, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, own = write_image_tokenizer(tmp_path / "few", num_codes=16), str(scene / "bundle/image_tokenizer")
    two = {"path": str(scene / "large_pairs"), "image_tokenizer": own, "high_res_tokenizer": str(large)}
    direct = superres_settings(scene, tmp_path / "direct", train={"steps": 1}, data=two)
    train(direct)
    export = str(direct.run_dir / "export/direct_superres")
    begun = str(tmp_path / "begun")
    assert prepare(scene, Path(begun), *SIZES, "--high-res-tokenizer", str(large)) == 0

    def refused(message: str, words: list[str]) -> None:
        capsys.readouterr()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

    captions = ["prepare", "--captions", str(scene / "videos/captions.jsonl"), "--tokenizer", own, "--out"]
    new = str(tmp_path / "new")
    for dry in ([], ["--dry-run"]):
        refused("has 16 codes, the other one 32", [*captions, new, *SIZES, "--high-res-tokenizer", str(few), *dry])
    refused("is for pairs; give low_res_pixels", [*captions, new, "frame_pixels=48", "--high-res-tokenizer", str(few)])
    refused("was begun with other high_res_tokenizer", [*captions, begun, *SIZES])
    refused("give --direct too", bundle_words(scene, tmp_path / "new", "--high-res-tokenizer", str(large)))
    refused("another image tokenizer of large frames", bundle_words(scene, tmp_path / "new", "--direct", export))
    assert main(bundle_words(scene, tmp_path / "one")) == 0
    small = ["upsample", str(scene / "videos/clips/000000.mp4"), "--caption", "x", "--direct", export]
    refused(
        "another image tokenizer of large frames than that of the bundle",
        [*small, "--model", str(tmp_path / "one"), "--out", new],
    )
    assert not Path(new).exists()
    for message, data in {
        "data.high_res_tokenizer=null did not make": two | {"high_res_tokenizer": None},
        "few did not make the tokens of the large frames": two | {"high_res_tokenizer": str(few)},
        "validation=.* by another image tokenizer of large frames than": two | {"validation": str(scene / "pairs")},
        "data.high_res_tokenizer: .*none": two | {"high_res_tokenizer": str(tmp_path / "none")},
    }.items():
        with pytest.raises(ValueError, match=message):
            train(superres_settings(scene, Path(new), data=data))
    again = {"checkpoint": export, "freeze_trunk": False}
    with pytest.raises(ValueError, match="was trained with another image tokenizer of large frames than"):
        train(superres_settings(scene, Path(new), init=again))
    with pytest.raises(ValueError, match=r"data\.high_res_tokenizer is for task=superres"):
        from_dict(TrainConfig, {"task": "image", "data": {"high_res_tokenizer": str(large)}})


def test_two_processes_train_like_one(scene: Path, tmp_path: Path) -> None:
    losses = []
    for world in (1, 2):
        config = superres_settings(
            scene, tmp_path / f"world_{world}", superres={**_sizes(scene), "dropout": 0.0, "attention_dropout": 0.0}
        )
        group = ranks.start(ranks.train_words(config), world, tmp_path / f"said_{world}")
        assert ranks.finish(group, 300) == [0] * world
        losses.append([line["loss"] for line in read_metrics(config.run_dir)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def _sizes(scene: Path) -> dict[str, Any]:
    config = superres_settings(scene, Path("x")).superres
    names = ("num_layers", "hidden_size", "num_heads", "text_len", "low_res_side", "high_res_side", "num_positions")
    return {name: getattr(config, name) for name in (*names, "low_res_position_start")}


BAD = {
    "data.path is not set": {"data": {"path": None}},
    "set superres.high_res_side": {"superres": {"high_res_side": 4}},
    "set superres.low_res_side": {"superres": {"low_res_side": 3}},
    "set init.checkpoint": {"init": {"freeze_trunk": True, "checkpoint": None}},
    "superres.low_res_position_start=33": {"superres": {"low_res_position_start": 30}},
    "does not fit the model": {"superres": {"hidden_size": 32}},
    "cogvideo-pairs": {"data": {"path": "clips"}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_are_a_one_line_error_before_anything_is_written(
    message: str, scene: Path, tmp_path: Path
) -> None:
    groups: dict[str, Any] = dict(BAD[message])
    if "superres" in groups:
        groups["superres"] = {"method": "direct", **_sizes(scene), **groups["superres"]}
    if groups.get("data", {}).get("path"):
        if not (scene / "clips").is_dir():
            assert prepare(scene, scene / "clips", "frame_pixels=48", "clips.clip_seconds=[4]") == 0
        groups["data"] = {"path": str(scene / "clips")}
    with pytest.raises(ValueError, match=message) as caught:
        train(superres_settings(scene, tmp_path / "run", **groups))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frame_pixels=48", "low_res_pixels=20"], "expected a divisor of frame_pixels=48"),
        (["frame_pixels=48", "low_res_pixels=12"], "low_res_pixels=12 is not a multiple of"),
    ],
)
def test_unusable_pair_sizes_are_refused(
    scene: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(scene, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_adapters_resume_bitwise_and_merge(method: str, scene: Path, tmp_path: Path) -> None:
    base = superres_settings(scene, tmp_path / "base", method, train={"steps": 1})
    train(base)
    checkpoint = tmp_path / "base/export" / f"{method}_superres"
    lora = {"init": {"checkpoint": checkpoint, "trunk_weights": "int8"}, "lora": {"rank": 2}}
    whole, parts = (superres_settings(scene, tmp_path / name, method, **lora) for name in ("whole", "parts"))
    train(whole)
    train(superres_settings(scene, tmp_path / "parts", method, **lora, train={"stop_at": 1}))
    train(parts, resume=True)
    assert read_metrics(whole.run_dir) == read_metrics(parts.run_dir)
    adapters = [config.run_dir / "export/adapter/adapter_model.safetensors" for config in (whole, parts)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert (
        main(["merge", str(checkpoint), "--adapter", str(adapters[0].parent), "--out", str(tmp_path / "merged")]) == 0
    )
    assert load_checkpoint(tmp_path / "merged").config == load_checkpoint(checkpoint).config
