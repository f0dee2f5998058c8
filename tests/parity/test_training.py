"""The model in training against the published code: logits, losses, hidden states and gradients of both stages."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cogvideo.model.inputs import TextBias
from cogvideo.model.plan import plan_forward
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import Batch, frame_inputs
from cogvideo.sequence.prompt import left_pad
from tests.helpers.packs import Pack, open_pack, our_name, published_model
from tests.reference import transformer as reference

TEXT_LEN = 64


class Run(NamedTuple):
    """A training step on a pack, the trunk learning too (as in the pack), and a forward that answers every row."""

    pack: Pack
    model: CogVideoTransformer
    batch: Batch
    losses: Tensor
    frame_states: list[Tensor]
    """Frame rows after each layer."""
    final: Tensor


@pytest.fixture(scope="module", params=["train_stage1", "train_stage2_window"])
def run(request: pytest.FixtureRequest) -> Run:
    pack = open_pack(request.param)
    window = pack.about["window_size"]
    model = published_model(pack.about["stage"], None if window == -1 else window)
    rows, pad = pack["rows"], pack.about["special"]["<pad>"]
    texts = [[int(i) for i in row[:TEXT_LEN] if i != pad] for row in rows]
    text, mask = (torch.from_numpy(a) for a in left_pad(texts, TEXT_LEN, pad))
    batch = Batch(text, mask, rows[:, TEXT_LEN:].unflatten(1, (5, 400)), torch.full((len(rows),), 4.0))

    states: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: states.append(out[1].detach())) for layer in model.layers]
    inputs = frame_inputs(batch.frames, model.config.vocabulary.start_of_image)
    with torch.no_grad():
        final = model(inputs, plan_forward(model.config), TextBias.from_mask(batch.text_mask), text=batch.text)
    for hook in hooks:
        hook.remove()
    losses = model.token_losses(batch)
    losses.mean().backward()
    return Run(pack, model, batch, losses.detach(), states, final)


def test_rows_become_the_published_inputs(run: Run) -> None:
    assert torch.equal(run.batch.text, run.pack["tokens"][:, :TEXT_LEN])
    assert torch.equal(run.batch.text_mask, run.pack["mask"][:, 0, 0].bool())
    assert torch.equal(run.batch.frames.flatten(1), run.pack["labels"][:, TEXT_LEN:])
    supervised = torch.zeros(5, 400)
    supervised[list(run.model.config.layout.supervised_frames)] = 1
    assert torch.equal(supervised.flatten().expand(2, -1), run.pack["loss_mask"][:, TEXT_LEN:])


def test_logits(run: Run) -> None:
    with torch.no_grad():
        logits = run.model.logits(run.final[:, run.pack["logits_at"]])
    torch.testing.assert_close(logits, run.pack["logits"], atol=1e-4, rtol=0)


def test_losses(run: Run) -> None:
    assert run.losses.mean().item() == pytest.approx(run.pack.about["loss"], abs=1e-5)
    published = run.pack["losses"].unflatten(1, (5, 400))[:, list(run.model.config.layout.supervised_frames)]
    torch.testing.assert_close(run.losses, published, atol=1e-4, rtol=0)
    for i, frame in enumerate(run.model.config.layout.supervised_frames):
        mine, kind = run.losses[:, i].mean().item(), "AR" if run.pack.about["stage"] == 1 else "ITP"
        assert mine == pytest.approx(run.pack.about["partial"][f"{kind}_f{frame}_loss"], abs=1e-5)


def test_hidden_states(run: Run) -> None:
    """Text rows are not compared: they are those of the trunk, and whatever errs there shows in the frame rows."""
    at = run.pack["hidden_at"]
    frame_rows = at >= TEXT_LEN
    for ours, published in zip(run.frame_states, run.pack["hidden"], strict=True):
        torch.testing.assert_close(ours[:, at[frame_rows] - TEXT_LEN], published[:, frame_rows], atol=1e-4, rtol=1e-5)


def test_gradient_of_every_parameter(run: Run) -> None:
    ours = dict(run.model.named_parameters())
    norms = run.pack.about["grad_norms"]
    assert {our_name(name) for name in norms} == set(ours)
    for name, norm in norms.items():
        grad = ours[our_name(name)].grad
        assert grad is not None, name
        assert grad.norm().item() == pytest.approx(norm, rel=1e-3), name


def test_gradients_elementwise(run: Run) -> None:
    ours = dict(run.model.named_parameters())
    kept = [name for name in run.pack.tensors if name.startswith("grad.")]
    assert len(kept) >= 5
    for name in kept:
        published = run.pack[name]
        torch.testing.assert_close(
            ours[our_name(name.removeprefix("grad."))].grad, published, atol=1e-4 * published.abs().max().item(), rtol=0
        )


def test_own_reference_agrees_too(run: Run) -> None:
    """The slow reference of tests/reference stands for the published code at sizes that no pack has."""
    one = slice(0, 1)
    weights = {name: p.detach() for name, p in run.model.named_parameters()}
    logits, _ = reference.forward(
        weights, run.model.config, run.batch.text[one], run.batch.text_mask[one], run.batch.frames[one]
    )
    torch.testing.assert_close(logits[:, run.pack["logits_at"]].float(), run.pack["logits"][one], atol=1e-4, rtol=0)
