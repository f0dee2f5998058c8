"""Names of published tensors: old spellings, and the kind of model they belong to."""

import pytest

from cogvideo.checkpoint.parameters import PARAMETERS, ModelKind, model_parameters
from cogvideo.checkpoint.sat.names import canonical_sat_name, kind_from_names


@pytest.mark.parametrize(
    ("old", "current"),
    [
        ("word_embeddings.weight", "transformer.word_embeddings.weight"),
        ("mixins.0.position_embeddings.weight", "mixins.extra_position_embedding.position_embeddings.weight"),
        ("mixins.1.query_key_value.11.bias", "mixins.attention_plus.query_key_value.11.bias"),
        ("mixins.1.attn_distribution.3", "mixins.attention_plus.attn_distribution.3"),
    ],
)
def test_old_names_become_current(old: str, current: str) -> None:
    assert canonical_sat_name(old) == current


@pytest.mark.parametrize("kind", PARAMETERS)
def test_current_names_stay_and_tell_the_kind(kind: ModelKind) -> None:
    names = [parameter.sat_name for parameter in model_parameters(kind, 2)]
    assert [canonical_sat_name(name) for name in names] == names
    assert kind_from_names(names) == kind
