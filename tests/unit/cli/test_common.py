"""What commands share: arguments that name weights are fetched after parsing."""

import argparse
from pathlib import Path

import pytest

from cogvideo.cli import _common as module


def test_every_named_weights_argument_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resolve", lambda path: Path("cache") / path)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=module.weights, action="append")
    parser.add_argument("--direct", type=module.weights)
    parser.add_argument("--iterative", type=module.weights)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(["--model", "a/b", "--model", "c/d", "--direct", "e/f", "--out", "g"])
    module.fetch_weights(parser, args)
    assert args.model == [Path("cache/a/b"), Path("cache/c/d")]
    assert (args.direct, args.iterative, args.out) == (Path("cache/e/f"), None, Path("g"))
