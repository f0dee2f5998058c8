"""Publishing: what of a folder is uploaded, the model card, and the pipeline's methods that model hubs know."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cogvideo.checkpoint.adapter import Base, fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model
from cogvideo.files import write_json
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.publish import Publication
from tests.helpers import pipelines
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.hub import Hub, log_in

MODELS = ("trunk", "sequential", "interpolation")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle", shared_trunk=True)


@pytest.fixture
def bundle(stored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored, tmp_path / "run" / "bundle")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_run(folder: Path) -> None:
    (folder.parent / "clips").mkdir(parents=True, exist_ok=True)
    write_json(folder.parent / "clips/manifest.json", {"rows": 1234})
    folder.mkdir(parents=True)
    config = {"data": {"path": [str(folder.parent / "clips")]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = ['{"step": 1, "loss": 3.5, "lr": 0.1}', '{"step": 2, "loss": 2.25}', '{"validation/loss": 2.5, "step', "[]"]
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_a_bundle_is_its_files(bundle: Path) -> None:
    publication = Publication.of(bundle)
    assert publication.kind == "bundle"
    assert publication.weights.keys() == contents(bundle).keys()
    assert publication.settings.keys() == set(MODELS)


def test_kinds_and_their_files(bundle: Path, tmp_path: Path) -> None:
    base = Base(model="trunk", sha256=fingerprint(load_checkpoint(bundle / "trunk")), step=1)
    adapter = write_adapter(tmp_path / "adapter", load_model(bundle / "trunk"), base)
    for folder, kind in (
        (adapter, "adapter"),
        (bundle / "trunk", "checkpoint"),
        (bundle / "image_tokenizer", "image tokenizer"),
    ):
        publication = Publication.of(folder)
        assert publication.kind == kind
        assert publication.weights.keys() == contents(folder).keys()
        assert kind in publication.card("someone/clips", None)


@pytest.mark.parametrize("name", ["notes.txt", "trunk/optimiser.pt", "sequential/x.safetensors", ".env", "trunk/a.png"])
def test_files_that_do_not_belong_are_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name}: not part of the bundle; move it elsewhere"):
        Publication.of(bundle)


@pytest.mark.parametrize("name", ["README.md", "samples.png", "trunk/config.json", "text.model"])
def test_links_that_lead_out_are_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes((bundle / name).read_bytes() if (bundle / name).exists() else b"secret")
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name} is a link that points outside the folder"):
        Publication.of(bundle)


def test_a_manifest_cannot_name_other_files(bundle: Path) -> None:
    names = Publication.of(bundle / "trunk").weights.keys()
    (bundle / "secret.txt").write_bytes(b"x")
    manifest = json.loads((bundle / "trunk/manifest.json").read_text())
    manifest["files"] |= {name: {"sha256": "", "size": 1} for name in ("../secret.txt", "optimiser.pt")}
    write_json(bundle / "trunk/manifest.json", manifest)
    assert Publication.of(bundle / "trunk").weights.keys() == names
    (bundle / "trunk/optimiser.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"optimiser.pt: not part of the checkpoint"):
        Publication.of(bundle / "trunk")


def test_folders_that_are_not_ours_or_damaged(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Publication.of(tmp_path / "absent")
    with pytest.raises(ValueError, match="is not a bundle, checkpoint, adapter or image tokenizer"):
        Publication.of(tmp_path)
    with pytest.raises(ValueError, match="is stored without its trunk"):
        Publication.of(bundle / "sequential")
    weights = bundle / "trunk/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        Publication.of(bundle)


def test_the_card_says_what_is_known(bundle: Path) -> None:
    write_run(bundle.parent / "sequential")
    (bundle / "README.md").write_text("Trained for fun.\n", encoding="utf-8")
    (bundle / "samples.png").write_bytes(b"png")
    publication = Publication.of(bundle)
    card = publication.card("someone/clips", "apache-2.0")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "library_name": "cogvideo",
        "tags": ["cogvideo", "text-to-video"],
        "pipeline_tag": "text-to-video",
    }
    for part in ("--model someone/clips", "![samples](samples.png)", "hidden_size: 16", "Trained for fun."):
        assert part in text
    assert "`clips`, 1,234 rows" in text and str(bundle.parent) not in text
    assert "| loss | 2.25 |" in text and "| step | 2 |" in text and "lr" not in text.split("## Training")[1]


def test_an_export_names_its_run(bundle: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs/mine")
    export = shutil.copytree(bundle / "trunk", tmp_path / "runs/mine/export/trunk")
    assert "## Training of trunk" in Publication.of(export).card("someone/clips", None)


def test_a_card_of_ones_own_and_licenses(bundle: Path) -> None:
    with pytest.raises(ValueError, match="--license My own: expected a license identifier"):
        Publication.of(bundle).card("someone/clips", "My own")
    card = "---\nlicense: mit\n---\n# Mine\n"
    (bundle / "README.md").write_text(card, encoding="utf-8")
    assert Publication.of(bundle).card("someone/clips", None) == card
    with pytest.raises(ValueError, match="front matter of its own"):
        Publication.of(bundle).card("someone/clips", "mit")


def test_a_pipeline_to_the_hub_and_back(bundle: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch)
    before = contents(bundle)
    pipeline = Pipeline.load(str(bundle))
    pipeline.push_to_hub("someone/clips", private=True, license="mit")
    assert contents(bundle) == before
    assert hub.newest("someone/clips").keys() == {*before, "README.md", ".gitattributes"}
    again = Pipeline.from_pretrained("someone/clips", revision="main")
    again.save_pretrained("saved")
    assert contents(Path("saved")) == before
    with pytest.raises(FileExistsError):
        again.save_pretrained("saved")
    assert again.sample(CAPTIONS[:1]).equal(pipeline.sample(CAPTIONS[:1]))


def test_what_cannot_be_saved(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not loaded from a bundle"):
        pipelines.pipeline().save_pretrained(tmp_path / "saved")
    pipeline = Pipeline.load(bundle)
    base = Base(model="sequential", sha256=fingerprint(load_checkpoint(bundle / "sequential")), step=1)
    pipeline.add_adapter("mine", str(write_adapter(tmp_path / "adapter", load_model(bundle / "sequential"), base)))
    pipeline.set_adapters({"mine": 1.0})
    with pytest.raises(ValueError, match="adapters are in effect"):
        pipeline.save_pretrained(tmp_path / "saved")
    pipeline.set_adapters({})
    pipeline.save_pretrained(tmp_path / "saved")
