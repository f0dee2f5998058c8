"""scripts/check_packs.py on golden packs, on packs of other sizes made by our slow reference, and on spoilt ones."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideo.checkpoint import load_checkpoint
from cogvideo.checkpoint.load import load_model, save_model
from cogvideo.checkpoint.parameters import model_parameters
from cogvideo.checkpoint.sat.convert import to_sat
from tests.helpers.models import tiny_batch, tiny_config, tiny_model
from tests.helpers.packs import GOLDEN, open_pack
from tests.helpers.scripts import ROOT, load_script
from tests.reference import transformer as reference

check_packs = load_script("check_packs")
Check = Callable[[Path], tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Exit code, and the line of each pack by its name."""

    def run(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
        monkeypatch.setattr(sys, "argv", ["check_packs.py", str(folder)])
        capsys.readouterr()
        code = check_packs.main()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return code, {line["pack"]: line for line in lines}

    return run


def write_pack(folder: Path, name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    save_file({k: v.int() if v.dtype == torch.int64 else v for k, v in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(about))


def test_golden_packs(check: Check, tmp_path: Path) -> None:
    """The training pack of stage 1, and the first frame's decoding pack put back into its full form."""
    shutil.copytree(GOLDEN / "sat-stage1", tmp_path / "sat-stage1")
    for suffix in ("json", "safetensors"):
        shutil.copy(GOLDEN / f"train_stage1.{suffix}", tmp_path)
    pack, training = open_pack("decode_d1_first_frame"), open_pack("train_stage1")
    text_len = pack.about["text_len"]
    given = pack["tokens"].clone()
    given[:, text_len + 1 :] = -1
    tensors = {
        "tokens": pack["tokens"],
        "seq": given[:1],
        "guided_logits": pack["logits"],
        "kept_steps": pack["index"] - text_len - 1,
    }
    sizes = {k: training.about[k] for k in ("num_image_tokens", "num_attention_heads", "special", "frame_side")}
    write_pack(tmp_path, "decode_d1_first_frame", tensors, {**pack.about, **sizes, "mode_stage1": True})
    (tmp_path / "params_full_size.json").write_text("{}")  # no pack: passed over

    code, lines = check(tmp_path)
    assert code == 0
    assert lines["train_stage1"]["max_logit_error"] < 1e-4
    assert lines["train_stage1"]["loss_error"] < 1e-5
    assert lines["train_stage1"]["max_gradient_norm_error"] < 1e-3
    assert lines["decode_d1_first_frame"]["max_logit_error"] < 1e-4
    assert lines["decode_d1_first_frame"]["tokens_equal"] is True


@pytest.fixture(params=["sequential", "interpolation"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a training pack of another width, depth, frame size and window."""
    window = 2 if request.param == "interpolation" else None
    config = tiny_config(request.param, num_layers=2, frame_position_start=512, num_positions=1024, window_size=window)
    model, stage = tiny_model(config), 1 if request.param == "sequential" else 2
    save_model(tmp_path / "ours", model)
    packs = tmp_path / "packs"
    packs.mkdir()
    to_sat(tmp_path / "ours", packs / f"sat-stage{stage}").run(lambda: None)

    batch, words = tiny_batch(config), config.vocabulary
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits, _ = reference.forward(weights, config, batch.text, batch.text_mask, batch.frames)
    losses = -logits.log_softmax(-1).gather(-1, batch.frames.flatten(1)[..., None])[..., 0]
    loss = losses.unflatten(1, (5, 16))[:, list(config.layout.supervised_frames)].mean()
    loss.backward()
    about = {
        "stage": stage,
        "window_size": window or -1,
        "num_attention_heads": config.num_heads,
        "num_image_tokens": words.num_image_tokens,
        "special": {"<pad>": words.pad, "<n>": words.newline, "<start_of_image>": words.start_of_image},
        "layout": [batch.text.shape[1], batch.text.shape[1] + config.frame_len],  # as training packs give sizes
        "loss": loss.item(),
        "grad_norms": {p.sat_name: weights[p.name].grad.norm().item() for p in model_parameters("video", 2)},  # type: ignore[union-attr]
    }
    rows = torch.cat([batch.text, batch.frames.flatten(1)], 1)
    write_pack(packs, "train_other", {"rows": rows, "logits": logits.detach().float()}, about)
    return packs


def test_packs_of_other_sizes(check: Check, other: Path) -> None:
    code, lines = check(other)
    assert code == 0
    assert lines["train_other"]["max_logit_error"] < 1e-5
    assert lines["train_other"]["loss_error"] < 1e-6
    assert lines["train_other"]["max_gradient_norm_error"] < 1e-5


def write_decoding_pack(packs: Path, *, spoilt: bool = False) -> None:
    """Guided, by the reference, along its own greedy choices for the last frame; texts of unequal lengths."""
    checkpoint = packs.parent / "ours"
    config = load_model(checkpoint).config
    weights = {name: p.double() for name, p in load_checkpoint(checkpoint).tensors().items()}
    rng = torch.Generator().manual_seed(8)
    ids = config.vocabulary
    text, guide = (torch.randint(ids.start_of_image, ids.size, (2, n), generator=rng) for n in (5, 3))
    frames = torch.randint(ids.num_image_tokens, (2, 5, config.frame_len), generator=rng)

    def logits() -> Tensor:
        both = [reference.forward(weights, config, t, torch.ones_like(t).bool(), frames)[0] for t in (text, guide)]
        return both[1] + 3.0 * (both[0] - both[1])

    known = 4 * config.frame_len
    for slot in range(config.frame_len):
        frames[:, 4, slot] = logits()[:, known + slot].argmax(-1)
    top = logits()[:, known:].topk(2).values
    if spoilt:
        frames[1, 4, -1] = (frames[1, 4, -1] + 1) % ids.num_image_tokens  # what it saw is the same, not what it chose
    boi = torch.full((2, 1), ids.start_of_image)
    tokens = torch.cat([text, boi, frames.flatten(1)], 1)
    given = tokens.clone()
    given[:, 6 + known :] = -1
    kept = torch.arange(0, config.frame_len, 3)
    write_pack(
        packs,
        "decode_other",
        {
            "tokens": tokens,
            "seq": given,
            "guider_seq": torch.cat([guide, boi, frames.flatten(1)], 1),
            "kept_steps": kept,
            "guided_logits": logits()[:, known:][:, kept].transpose(0, 1).float().contiguous(),
            "margin": (top[..., 0] - top[..., 1]).T.float().contiguous(),
        },
        {
            "mode_stage1": True,
            "text_len": 5,
            "guider_text_len": 3,
            "guidance_alpha": 3.0,
            "num_attention_heads": config.num_heads,
            "num_image_tokens": ids.num_image_tokens,
            "special": {"<pad>": ids.pad, "<n>": ids.newline, "<start_of_image>": ids.start_of_image},
        },
    )


@pytest.mark.parametrize("other", ["sequential"], indirect=True)
def test_guided_decoding_packs_of_other_sizes(check: Check, other: Path) -> None:
    write_decoding_pack(other)
    (other / "broken.json").write_text(json.dumps({"grad_norms": {}}))  # one that cannot be read stops no other
    save_file({"rows": torch.zeros(1, 3).int()}, other / "broken.safetensors")
    code, lines = check(other)
    assert code == 1
    assert "KeyError" in lines["broken"]["error"] and lines["train_other"]["ok"]
    assert lines["decode_other"]["ok"] and lines["decode_other"]["max_logit_error"] < 1e-5
    assert lines["decode_other"]["tokens_equal"] is True


@pytest.mark.parametrize("other", ["sequential"], indirect=True)
def test_another_token_than_the_likeliest_is_an_error(check: Check, other: Path) -> None:
    write_decoding_pack(other, spoilt=True)
    code, lines = check(other)
    line = lines["decode_other"]
    assert (code, line["tokens_equal"], line["tokens_other_than_ties"]) == (1, False, 1)
    assert line["max_logit_error"] < 1e-5


@pytest.mark.parametrize("other", ["sequential"], indirect=True)
@pytest.mark.parametrize("spoilt", ["logits", "loss", "grad_norms"])
def test_a_spoilt_pack_is_noticed(check: Check, other: Path, spoilt: str) -> None:
    tensors, about = load_file(other / "train_other.safetensors"), json.loads((other / "train_other.json").read_text())
    if spoilt == "logits":
        tensors["logits"][1, 40, 3] += 1e-3
    elif spoilt == "loss":
        about["loss"] += 1e-3
    else:
        name = next(iter(about["grad_norms"]))
        about["grad_norms"][name] *= 1.001
    write_pack(other, "train_other", tensors, about)
    code, lines = check(other)
    assert code == 1
    assert lines["train_other"]["ok"] is False


def test_a_folder_without_packs(check: Check, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts/check_packs.py"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "holds no training or decoding packs" in done.stderr
    assert check(tmp_path / "missing") == (2, {})
