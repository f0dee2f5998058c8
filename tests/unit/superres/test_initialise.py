"""Starting values inherited from a text-to-image trunk."""

from dataclasses import replace

import pytest
import torch

from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.superres.initialise import inherit_trunk
from cogvideo.superres.transformer import SuperresTransformer
from tests.helpers.superres import TINY_CONFIGS, TINY_VOCABULARY


@pytest.mark.parametrize("method", TINY_CONFIGS)
def test_trunk_is_inherited(method: str) -> None:
    image = ModelConfig(
        task="image", num_layers=2, hidden_size=16, num_heads=2, text_len=5, frame_side=4, num_frames=1,
        num_positions=32, frame_position_start=6, vocabulary=TINY_VOCABULARY,
    )  # fmt: skip
    trunk = CogVideoTransformer(image)
    initialise(trunk, torch.Generator().manual_seed(5))
    tensors = dict(trunk.named_parameters())
    model = SuperresTransformer(TINY_CONFIGS[method])
    inherit_trunk(model, tensors)
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        assert torch.equal(own[name], tensor)
    for y in range(12):
        for x in range(12):
            expected = tensors["position_embeddings.weight"][6 + y % 4 * 4 + x % 4]
            assert torch.equal(own["extra_position_embeddings.weight"][12 * y + x], expected)
    if method == "direct":
        for field in ("query_key_value.weight", "query_key_value.bias", "dense.weight", "dense.bias"):
            assert torch.equal(own[f"layers.1.high_res_attention.{field}"], tensors[f"layers.1.attention.{field}"])
    before = own["final_layernorm.weight"].detach().clone()
    with pytest.raises(ValueError, match=r"the trunk lacks layers\.1\.mlp"):
        inherit_trunk(model, {name: t + 1 for name, t in tensors.items() if "layers.1.mlp" not in name})
    assert torch.equal(own["final_layernorm.weight"], before)


@pytest.mark.parametrize(
    "changes", [{"low_res_position_start": 0}, {"low_res_position_start": 18}, {"low_res_side": 5}]
)
def test_trunk_positions_must_tile_the_fine_grid(changes: dict[str, int]) -> None:
    model = SuperresTransformer(replace(TINY_CONFIGS["iterative"], **changes))
    with pytest.raises(ValueError, match=r"set superres\.low_res_side and low_res_position_start"):
        inherit_trunk(model, dict(model.named_parameters()))
