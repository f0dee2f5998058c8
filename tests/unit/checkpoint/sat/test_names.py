"""The table of parameters against the model itself and the published counts."""

import math

import pytest
import torch

from cogvideo.checkpoint.describe import kind_of, sizes_of
from cogvideo.checkpoint.sat.names import Kind, Sizes, Split, expand, today
from cogvideo.checkpoint.sat.shard import merge, part_of, part_shape, whole_shape
from cogvideo.model.config import ModelConfig, Task
from cogvideo.model.transformer import CogVideoTransformer, is_temporal


@pytest.mark.parametrize("task", ["image", "sequential", "interpolation"])
def test_the_table_is_the_model(task: Task) -> None:
    config = ModelConfig(task=task, num_layers=3, hidden_size=16, num_heads=2, text_len=8, frame_side=4)
    model = CogVideoTransformer(config)
    sizes = sizes_of(config)
    table = {p.name: sizes.of(p) for p in expand(kind_of(config), config.num_layers)}
    assert table == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {n for n in table if is_temporal(n)} == table.keys() - {p.name for p in expand("image", config.num_layers)}


@pytest.mark.parametrize(
    ("kind", "extra", "count"),
    [
        ("image", 0, 5_902_307_328),
        ("video", 2000, 7_721_127_936),
        ("direct_superres", 3600, 7_725_895_680),
        ("iterative_superres", 3600, 5_913_366_528),
    ],
)
def test_published_counts(kind: Kind, extra: int, count: int) -> None:
    sizes = Sizes(48, 3072, 150010, 1024, extra)
    parameters = expand(kind, 48)
    assert sum(math.prod(sizes.of(p)) for p in parameters) == count
    assert len({p.name for p in parameters}) == len({p.sat for p in parameters}) == len(parameters)


def test_old_names() -> None:
    assert today("word_embeddings.weight") == "transformer.word_embeddings.weight"
    assert today("mixins.0.position_embeddings.weight") == "mixins.extra_position_embedding.position_embeddings.weight"
    assert today("mixins.1.query_key_value.11.bias") == "mixins.attention_plus.query_key_value.11.bias"
    assert today("mixins.1.attn_distribution.3") == "mixins.attention_plus.attn_distribution.3"
    assert today("transformer.layers.0.mlp.dense_4h_to_h.bias") == "transformer.layers.0.mlp.dense_4h_to_h.bias"


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("split", list(Split))
def test_parts_merge_to_the_whole(split: Split, ranks: int) -> None:
    whole = torch.arange(24.0 * 8).reshape(24, 8)
    parts = [part_of(whole, split, rank, ranks) for rank in range(ranks)]
    assert torch.equal(merge(parts, split), whole)
    for part in parts:
        assert tuple(part.shape) == part_shape((24, 8), split, ranks)
        assert whole_shape(tuple(part.shape), split, ranks) == (24, 8)


def test_a_rank_holds_its_own_q_k_and_v() -> None:
    """Spec: cut into 3*mp chunks, rank k holds chunks k, k+mp, k+2mp."""
    whole = torch.arange(12.0)
    assert part_of(whole, Split.QKV, 1, 2).tolist() == [2, 3, 6, 7, 10, 11]


def test_ranks_must_divide() -> None:
    with pytest.raises(ValueError, match="5 ranks"):
        part_shape((24, 8), Split.ROWS, 5)
