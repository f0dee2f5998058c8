"""`cogvideo score` on published rows with a converted checkpoint, on prepared folders, and on bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvideo.checkpoint.load import save_model
from cogvideo.cli.main import main
from cogvideo.data.shards import FORMATS, ROW, VERSION, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.tokenizers.text import TextTokenizer
from tests.helpers.models import tiny_batch, tiny_config, tiny_model
from tests.helpers.packs import GOLDEN, open_pack

VOCABULARY = ("vocab.num_image_tokens=200", "vocab.pad=200", "vocab.newline=201", "vocab.start_of_image=202")


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """A model and three published rows of its sizes, as command-line arguments."""
    model = tiny_model(tiny_config("sequential"))
    save_model(tmp_path / "model", model)
    batch = tiny_batch(model.config, batch=3)
    torch.cat([batch.text, batch.frames.flatten(1)], 1).int().numpy().tofile(tmp_path / "rows.bin")
    return ["score", "--model", str(tmp_path / "model"), "--rows", str(tmp_path / "rows.bin")]


def test_published_rows_score_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = open_pack("train_stage1")
    converted, out = str(tmp_path / "stage1"), tmp_path / "scores.safetensors"
    assert main(["convert", "--from", str(GOLDEN / "sat-stage1"), "--to", converted, *VOCABULARY]) == 0
    pack["rows"].int().numpy().tofile(tmp_path / "rows.bin")
    assert main(["score", "--model", converted, "--rows", str(tmp_path / "rows.bin"), "--out", str(out)]) == 0
    losses = load_file(out)["losses"]
    torch.testing.assert_close(losses.flatten(1), pack["losses"], atol=1e-4, rtol=0)
    printed = capsys.readouterr().out
    loss, first = (float(printed.split(title)[1].split()[0]) for title in ("all learned", "frame 1  learned"))
    assert loss == pytest.approx(pack.about["loss"], abs=1e-5)
    assert first == pytest.approx(pack.about["partial"]["AR_f1_loss"], abs=1e-5)


def test_batch_size_changes_nothing_and_logits_are_stored(tiny: list[str], tmp_path: Path) -> None:
    single, batched = tmp_path / "single.safetensors", tmp_path / "batched.safetensors"
    assert main([*tiny, "--out", str(single), "--batch", "1"]) == 0
    assert main([*tiny, "--out", str(batched), "--logits", "--limit", "2"]) == 0
    one_by_one, together = load_file(single), load_file(batched)
    torch.testing.assert_close(one_by_one["losses"][:2], together["losses"], atol=1e-5, rtol=1e-4)
    assert together["logits"].shape == (2, 80, 20)
    assert "logits" not in one_by_one


def test_a_prepared_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = TextTokenizer.train(["the red digit", "红色的数字"] * 9, tmp_path / "text.model", 320, 20)
    model = tiny_model(tiny_config("sequential", vocabulary=tokenizer.vocabulary, text_len=8))
    save_model(tmp_path / "model", model)
    data = tmp_path / "clips"
    rows = np.array([(0, 4.0, 0.0), (1, 2.0, 0.0)], ROW)
    tokens = np.random.default_rng(0).integers(0, 20, (2, 5, 16)).astype(np.uint16)
    write_shard(shard_folder(data, 0), {"rows.npy": rows, "tokens.npy": tokens}, [])
    (data / "captions.jsonl").write_text('{"text": "red"}\n{"text": "红色"}\n', encoding="utf-8")
    plan = {"format": FORMATS["tokens"], "version": VERSION, "tokenizer": {"num_tokens": 20}}
    write_manifest(data, plan, [read_shard(shard_folder(data, 0))])

    words = ["score", "--model", str(tmp_path / "model"), "--rows", str(data), "--out", str(tmp_path / "s.safetensors")]
    assert main(words) == 2
    assert "give --text-tokenizer" in capsys.readouterr().err
    assert main([*words, "--text-tokenizer", str(tmp_path / "text.model")]) == 0
    assert load_file(tmp_path / "s.safetensors")["losses"].shape == (2, 5, 16)

    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"num_tokens": 20', '"num_tokens": 2000'))
    assert main([*words, "--text-tokenizer", str(tmp_path / "text.model")]) == 2
    assert "with 2000 codes, the model knows" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--video-suffix"], ["--text-tokenizer", "text.model"]])
def test_options_of_prepared_folders_do_not_go_with_rows(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "text.model").touch()
    words = [str(tmp_path / word) if word == "text.model" else word for word in words]
    assert main([*tiny, "--out", str(tmp_path / "s.safetensors"), *words]) == 2
    assert f"{words[0]} is for prepared folders" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.safetensors"
    assert main([*tiny, "--out", str(out), "--dry-run"]) == 0
    assert "3 clips of 5 frames" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "scores.bin"], "ends in .safetensors"),
        (["--batch", "0", "--out", "a.safetensors"], "--batch 0; expected at least 1"),
        (["--rows", "missing.bin", "--out", "a.safetensors"], "missing.bin"),
        (["--model", "missing", "--out", "a.safetensors"], "no checkpoint folder at missing"),
        (["--rows", "CUT", "--out", "a.safetensors"], "expected a multiple of 344"),
    ],
)
def test_bad_input(
    tiny: list[str], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.bin"
    cut.write_bytes((tmp_path / "rows.bin").read_bytes()[:-1])
    assert main([*tiny, *[str(cut) if word == "CUT" else word for word in words]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_text_to_image_model_is_refused(tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "trunk", tiny_model(tiny_config("image")))
    assert main([*tiny, "--model", str(tmp_path / "trunk"), "--out", str(tmp_path / "a.safetensors")]) == 2
    assert "text-to-image model" in capsys.readouterr().err
