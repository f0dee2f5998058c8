"""Initial weights: random ones, and those inherited from a trunk."""

import math

import pytest
import torch
from torch import Tensor

from cogvideo.model.initialise import inherit_trunk, initialise
from cogvideo.model.transformer import CogVideoTransformer
from tests.helpers.models import tiny_config, tiny_model


def fresh(seed: int, **changes: object) -> dict[str, Tensor]:
    model = CogVideoTransformer(tiny_config(**changes))  # type: ignore[arg-type]
    initialise(model, torch.Generator().manual_seed(seed))
    return dict(model.state_dict())


def test_a_seed_repeats_bitwise() -> None:
    torch.manual_seed(0)
    first = fresh(5)
    torch.manual_seed(1)  # the global generator does not matter
    again, other = fresh(5), fresh(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["word_embeddings.weight"], other["word_embeddings.weight"])


def test_random_weights_are_as_in_the_table() -> None:
    values = fresh(0, hidden_size=64)
    small = 0.02 / math.sqrt(2 * 3)
    for name, tensor in values.items():
        if name.endswith("mix_logit") or name.endswith("bias"):
            assert not tensor.any(), name
        elif "layernorm" in name:
            assert (tensor == 1).all(), name
        else:
            trunk_output = name.endswith((".attention.dense.weight", "dense_4h_to_h.weight"))
            assert tensor.std().item() == pytest.approx(small if trunk_output else 0.02, rel=0.1), name


def test_mix_logit_has_the_given_value() -> None:
    model = CogVideoTransformer(tiny_config())
    initialise(model, torch.Generator().manual_seed(0), mix_logit=2.0)
    assert all((p == 2).all() for name, p in model.named_parameters() if name.endswith("mix_logit"))


@pytest.mark.parametrize("temporal_init", ["qkv", "qkv_and_dense"])
def test_inheritance(temporal_init: str) -> None:
    trunk = dict(tiny_model(tiny_config("image"), seed=3).state_dict())
    model = tiny_model(tiny_config("sequential"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inherit_trunk(model, trunk, temporal_init=temporal_init)  # type: ignore[arg-type]
    now = dict(model.state_dict())

    assert all(torch.equal(now[name], tensor) for name, tensor in trunk.items())
    for i in range(3):
        for kind in ("weight", "bias"):
            part = f"layers.{i}.%s.query_key_value.{kind}"
            assert torch.equal(now[part % "temporal_attention"], trunk[part % "attention"])
            part = f"layers.{i}.%s.dense.{kind}"
            source = before if temporal_init == "qkv" else trunk
            which = "temporal_attention" if temporal_init == "qkv" else "attention"
            assert torch.equal(now[part % "temporal_attention"], source[part % which])
        assert torch.equal(now[f"layers.{i}.mix_logit"], before[f"layers.{i}.mix_logit"])
    frame_positions = trunk["position_embeddings.weight"][8:24]
    assert torch.equal(now["extra_position_embeddings.weight"], torch.cat([frame_positions] * 5))


def test_inheriting_from_another_depth_or_width_is_refused() -> None:
    model = tiny_model(tiny_config("sequential"))
    shallow = dict(tiny_model(tiny_config("image", num_layers=2)).state_dict())
    with pytest.raises(ValueError, match=r"the trunk lacks layers\.2\."):
        inherit_trunk(model, shallow)
    smaller = dict(tiny_model(tiny_config("image", hidden_size=16)).state_dict())
    with pytest.raises(ValueError, match=r"the trunk's .* has shape"):
        inherit_trunk(model, smaller)


def test_a_refused_trunk_changes_nothing() -> None:
    model = tiny_model(tiny_config("sequential"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError):
        inherit_trunk(model, dict(tiny_model(tiny_config("image", num_layers=2)).state_dict()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
