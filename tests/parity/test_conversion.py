"""The golden checkpoints of the published code, converted by the command a user runs, and back bit for bit."""

from pathlib import Path

import pytest
import torch

from cogvideo.checkpoint.load import load_model
from cogvideo.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden"
VOCABULARY = ["vocab.num_image_tokens=200", "vocab.pad=200", "vocab.newline=201", "vocab.start_of_image=202"]


def published(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "7" / "mp_rank_00_model_states.pt", weights_only=True)["module"]


@pytest.mark.parametrize(("stage", "task", "window"), [(1, "sequential", None), (2, "interpolation", 10)])
def test_both_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int, task: str, window: int | None
) -> None:
    source, ours, back = GOLDEN / f"sat-stage{stage}", tmp_path / "ours", tmp_path / "back"
    assert main(["convert", "--from", str(source), "--to", str(ours), "--verbose", *VOCABULARY]) == 0
    printed = capsys.readouterr().out
    theirs = published(source)
    assert all(f"{name} -> " in printed for name in theirs)
    assert f"{len(theirs)} tensors mapped, 0 dropped" in printed

    model = load_model(ours)
    assert (model.config.task, model.config.window_size) == (task, window)
    assert (model.config.text_len, model.config.frame_side, model.config.num_frames) == (64, 20, 5)
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in theirs.values())
    logit = theirs["mixins.attention_plus.attn_distribution.2"]
    assert torch.equal(model.state_dict()["layers.2.mix_logit"], logit)

    assert main(["convert", "--from", str(ours), "--to", str(back), "--to-sat"]) == 0
    again = published(back)
    assert list(again) == list(theirs)
    for name, tensor in theirs.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert (back / "latest").read_text() == (source / "latest").read_text()
    assert (back / "model_config.json").read_text().split() == (source / "model_config.json").read_text().split()


def test_a_type_can_be_chosen(tmp_path: Path) -> None:
    arguments = ["convert", "--from", str(GOLDEN / "sat-stage1"), "--to", str(tmp_path / "ours")]
    assert main([*arguments, "--dtype", "bf16", *VOCABULARY]) == 0
    model = load_model(tmp_path / "ours")
    assert model.word_embeddings.weight.dtype == torch.bfloat16


def bad(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["convert", *arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(GOLDEN / "sat-stage1"), str(tmp_path / "out")
    assert "vocab.num_image_tokens" in bad(["--from", source, "--to", out], capsys)
    assert "did you mean" in bad(["--from", source, "--to", out, "vocab.paad=3"], capsys)
    assert "no folder" in bad(["--from", str(tmp_path / "absent"), "--to", out], capsys)
    assert "does not divide" in bad(["--from", source, "--to", out, "num_heads=5", *VOCABULARY], capsys)
    assert "window_size=3" in bad(["--from", source, "--to", out, "window_size=3", *VOCABULARY], capsys)
    assert "exists" in bad(["--from", source, "--to", str(tmp_path), *VOCABULARY], capsys)
    assert "--ranks" in bad(["--from", source, "--to", out, "--ranks", "2", *VOCABULARY], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing_and_leftovers_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "--from", str(GOLDEN / "sat-stage1"), "--to", str(tmp_path / "out"), *VOCABULARY]
    assert main([*arguments, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    killed = tmp_path / ".out.abcd_123.tmp"  # as left by a killed run
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
