"""Settings for all tests: GPU tests are skipped where there is none, and hypothesis repeats its examples each run."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.helpers.hub import Hub

# Many OpenMP threads make tiny tensors slower, many times so on a shared machine; xdist workers get one each.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line has it
os.environ.setdefault("WANDB_MODE", "offline")

# Without a deadline (a busy machine is not a bug), and derandomised: a red run can be run again.
hypothesis.settings.register_profile("cogvideo", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("cogvideo")


@pytest.fixture(autouse=True)
def _restored_linear() -> Iterator[None]:
    """ZeRO 3 replaces `torch.nn.functional.linear` for the whole process, and with it what other tests count."""
    yield
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is not None:
        linear = getattr(zero.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
        if linear is not None:
            sys.modules["torch.nn.functional"].linear = linear  # type: ignore[attr-defined]


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Signals as a terminal has them: a shell's background jobs start with SIGINT ignored, nohup's with SIGHUP."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGHUP, hangup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no core waits for one at the end; skip `gpu` tests where there is no device."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # takes seconds

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none here"))


@pytest.fixture
def fp16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let DeepSpeed train in fp16 on a CPU that emulates it."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


@pytest.fixture
def fresh_sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The idle processes that parse files: none at first, so that the next one is known."""
    from cogvideo.media import sandbox

    monkeypatch.setattr(sandbox, "_idle", type(sandbox._idle)())
    yield sandbox._idle
    while sandbox._idle:
        sandbox._idle.pop().kill()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Hub]":
    """A stand-in for the Hugging Face hub that huggingface_hub talks to, with an empty cache; run in tmp_path."""
    pytest.importorskip("huggingface_hub", reason="needs the extra [hub]")
    from tests.helpers.hub import serving, use

    monkeypatch.chdir(tmp_path)
    with serving() as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture(scope="module")
def quick_shapes() -> Iterator[None]:
    """The bodies world's classifier of shapes, trained on a few scenes only, in a second."""
    from cogvideo.worlds.bodies import appearance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appearance, "TRAINING_SCENES", 9)
        appearance.shape_classifier.cache_clear()
        yield
    appearance.shape_classifier.cache_clear()
