"""The debug run keeps its twenty losses: bitwise on the CPU model that they were recorded on."""

import pytest

from cogvideo.files import read_json
from tests.golden.make_losses import FILE, made_on, numbers, tokenizers

AGAIN = "run `python tests/golden/make_losses.py` and say why in docs/log.md"


def test_the_debug_run_keeps_its_losses() -> None:
    golden = read_json(FILE)
    assert tokenizers() == golden["tokenizers"], f"the bundled tokenizers have changed; {AGAIN}"
    found = numbers()
    assert len(found["losses"]) == 20 and found["losses"][-1] < found["losses"][0] - 0.5
    if made_on() == golden["made_on"]:
        for name in ("losses", "grad_norms", "tensors"):
            assert found[name] == golden[name], f"if these numbers were meant to change, {AGAIN}"
    else:
        assert found["losses"] == pytest.approx(golden["losses"], abs=1e-4), f"if they were meant to change, {AGAIN}"
