"""The self-test reports every check, and a wrong value as wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo.evaluation import self_test
from cogvideo.evaluation.frechet import Moments, frechet_distance
from cogvideo.evaluation.networks import KNOWN, KnownNetwork, ReferenceOutput, open_network
from cogvideo.evaluation.self_test import Check, run_self_test
from tests.helpers.networks import StandIn, write_network


def test_all_checks_without_a_network_pass() -> None:
    checks = list(run_self_test({}))
    assert len(checks) == 4 and all(check.passed for check in checks)
    assert Check("x", 1.0, 2.0, 0.5).passed is False and str(Check("x", 1.0, 2.0, 0.5)).startswith("WRONG")


def test_a_known_network_is_measured_on_the_published_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "RANDOM_CLIPS", 2)
    sha256 = write_network(tmp_path / "net.pt", StandIn())
    network = open_network("i3d", tmp_path / "net.pt", torch.device("cpu"), trust=True)
    monkeypatch.setitem(KNOWN, sha256, KnownNetwork("i3d", "net.pt", 1, 24, ReferenceOutput(1.0, 4, 16)))
    *_, levels, clips = run_self_test({"i3d": network})
    assert not levels.passed and not clips.passed
    whole = [np.random.RandomState(seed).rand(2, 16, 224, 224, 3).astype(np.float32) for seed in (1, 2)]
    sets = [Moments.of(network.features(torch.from_numpy(part).permute(0, 4, 1, 2, 3))) for part in whole]
    assert clips.got == pytest.approx(frechet_distance(*sets), rel=1e-4)
