"""Protocols are frozen: their hashes are those of the figures that were published with them."""

from dataclasses import fields, replace
from typing import Any

import pytest

from cogvideo.cli import eval as eval_command
from cogvideo.evaluation.networks import I3D_SHA256
from cogvideo.evaluation.protocols import LOCAL, NOT_HASHED, PROTOCOLS, Protocol, check_comparable

HASHES = {
    "tats-2048x16-128": "7bee919dc130",
    "styleganv-2048x16": "e5a45a297181",
    "ucf101-2048": "6aec784b0545",
    "ucf101-10000": "d1915debfed9",
    "kinetics600-5to11-64": "1d0cf2b3f212",
    "msrvtt-2990": "4d4e5c868883",
    "msrvtt-59794": "c5598edd0672",
    "local": "24b8cd062a99",
}


def test_hashes_have_not_moved() -> None:
    assert {name: protocol.hash for name, protocol in {**PROTOCOLS, "local": LOCAL}.items()} == HASHES
    # with the metrics of the networks in use
    assert LOCAL.with_networks({}).hash == replace(LOCAL, metrics=(), i3d_sha256=None).hash
    assert replace(LOCAL, metrics=("fvd", "kvd", "precision_recall", "is")).hash == "fac3ba51a494"


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol)])
def test_every_field_that_moves_numbers_moves_the_hash(field: str) -> None:
    old = getattr(LOCAL, field)
    others: dict[str, Any] = {"metrics": ("fvd",), "real_start": "first", "generated_start": "random", "crop": "squash"}
    others |= {"filter": "lanczos", "divisor": "n"}
    if field in others:
        new = others[field]
    elif isinstance(old, bool):
        new = not old
    elif isinstance(old, int | float) or old is None:
        new = (old or 0) + 1
    else:
        new = old + "x"
    assert (replace(LOCAL, **{field: new}).hash == LOCAL.hash) == (field in NOT_HASHED)


def test_the_known_network_is_part_of_the_hash() -> None:
    protocol = PROTOCOLS["tats-2048x16-128"]
    assert protocol.with_networks({"i3d": I3D_SHA256}).hash == protocol.hash
    other = protocol.with_networks({"i3d": "0" * 64})
    check_comparable(protocol, protocol.hash)
    with pytest.raises(ValueError, match=f"{protocol.hash}.*{other.hash}.*cannot be compared"):
        check_comparable(protocol, other)


def test_metrics_without_their_network_are_left_out() -> None:
    assert LOCAL.with_networks({"c3d": "1" * 64}).metrics == ("is",)
    assert LOCAL.with_networks({}).metrics == ()
    assert PROTOCOLS["ucf101-10000"].roles == ("c3d",) and not PROTOCOLS["ucf101-10000"].needs_real


def test_the_command_offers_all_protocols() -> None:
    assert set(eval_command.NAMES) == {*PROTOCOLS, "local", "digits", "bodies"}
