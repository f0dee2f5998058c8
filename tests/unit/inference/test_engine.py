"""Decoding at small sizes: what batch, padding, schedule and guidance change, and what they do not."""

import contextlib
import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.inference.backends import BACKENDS, EagerBackend, KVCache
from cogvideo.inference.engine import Conditioning, Engine, apply_guidance, build_program, with_kept_memory_released
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import Schedule, sequential
from cogvideo.model.inputs import DecodeInputs, TextBias
from cogvideo.model.plan import plan_forward
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import frame_inputs
from cogvideo.sequence.layout import ClipLayout
from tests.helpers import decoding as tiny

PAD = tiny.VOCABULARY.pad
TEXTS = [tiny.encode("left"), tiny.encode("quickly right")]
GUIDES = [tiny.encode("any")] * 2
SAMPLING = (np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)
MODELS = {"sequential": ("sequential", None), "windowed": ("sequential", 2), "interpolation": ("interpolation", 2)}


class RecordingSampler(ClusterSampler):
    """Samples, and records the logits."""

    def __init__(self) -> None:
        super().__init__(*SAMPLING)
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        self.logits.append(logits)
        return super().__call__(logits, uniforms)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> CogVideoTransformer:
    task, window = MODELS[request.param]
    return tiny.model(task, window)  # type: ignore[arg-type]


def conditioning(scale: float | None = 3.0, bonus: float = 0.0, rows: slice = slice(None)) -> Conditioning:
    guides = GUIDES[rows] if scale is not None else []
    return Conditioning.from_tokens(TEXTS[rows], guides, PAD, guidance_scale=scale, text_bonus=bonus)


def clips(model: CogVideoTransformer) -> tuple[Tensor, Tensor]:
    """Known tokens and uniforms for two clips."""
    rng, slots = np.random.default_rng(5), model.config.layout.num_slots
    known = torch.from_numpy(rng.integers(tiny.NUM_CODES, size=(2, slots)))
    return known, torch.from_numpy(rng.random((2, slots, 2)))


def plain(layout: ClipLayout) -> Schedule:
    return sequential(layout, layout.given_frames, layout.generation_order)


def test_texts_are_padded_to_a_multiple_and_draw_the_same_tokens() -> None:
    model = tiny.model("interpolation", 2)
    padded = conditioning().pad_text(16)
    assert padded.text.shape == padded.text_mask.shape == (4, 16) and conditioning().text.shape == (4, 13)
    assert torch.equal(padded.text[padded.text_mask], conditioning().text[conditioning().text_mask])
    assert padded.pad_text(8) is padded
    known, uniforms = clips(model)
    program, tokens = build_program(model.config, plain(model.config.layout)), []
    for multiple in (1, 16):
        engine = Engine(model, "eager")
        engine.backend.text_multiple = multiple
        tokens.append(engine.generate(program, known, conditioning(), RecordingSampler(), uniforms))
    assert torch.equal(*tokens)


def test_cached_decoding_equals_one_uncached_pass(model: CogVideoTransformer) -> None:
    layout = model.config.layout
    sampler, (known, uniforms) = RecordingSampler(), clips(model)
    tokens = Engine(model).generate(
        build_program(model.config, plain(layout)), known, conditioning(), sampler, uniforms
    )
    with torch.inference_mode():
        inputs = frame_inputs(tokens.view(2, -1, layout.frame_len), tiny.VOCABULARY.start_of_image).repeat(2, 1)
        some = conditioning()
        hidden = model(inputs, plan_forward(model.config), TextBias.from_mask(some.text_mask), text=some.text)
        whole = apply_guidance(model.logits(hidden), 3.0)[:, layout.slots_of(*layout.generation_order)]
    torch.testing.assert_close(torch.cat(sampler.logits, dim=1), whole, atol=1e-4, rtol=1e-4)
    given = layout.slots_of(*layout.given_frames)
    assert torch.equal(tokens[:, given], known[:, given])
    assert len(tokens.unique()) > 10, "the test means nothing if all tokens are alike"


def test_a_clip_does_not_depend_on_its_batch(model: CogVideoTransformer) -> None:
    """Alone, a clip's text is not padded; in the batch it is."""
    program = build_program(model.config, plain(model.config.layout))
    engine, (known, uniforms) = Engine(model), clips(model)
    batch = engine.generate(program, known, conditioning(bonus=1.4), RecordingSampler(), uniforms)
    for i in range(2):
        row = slice(i, i + 1)
        alone = engine.generate(
            program, known[row], conditioning(bonus=1.4, rows=row), RecordingSampler(), uniforms[row]
        )
        assert torch.equal(alone[0], batch[i])


def test_guidance() -> None:
    both = torch.tensor([[[3.0, 1.0]], [[1.0, 2.0]]])
    assert apply_guidance(both, 3.0).tolist() == [[[7.0, -1.0]]]
    assert apply_guidance(both, 1.0).tolist() == [[[3.0, 1.0]]]
    assert apply_guidance(both, None) is both


def test_a_guide_with_the_same_text_changes_nothing() -> None:
    model = tiny.model("sequential")
    program = build_program(model.config, plain(model.config.layout))
    known, uniforms = clips(model)
    same = Conditioning.from_tokens(TEXTS, TEXTS, PAD, guidance_scale=3.0, text_bonus=0.0)
    with_guide = Engine(model).generate(program, known, same, RecordingSampler(), uniforms)
    assert torch.equal(
        with_guide, Engine(model).generate(program, known, conditioning(None), RecordingSampler(), uniforms)
    )


def test_guides_have_no_text_bonus() -> None:
    """With a scale of 0 only the guide counts, and the bonus changes nothing."""
    model = tiny.model("sequential")
    program = build_program(model.config, plain(model.config.layout))
    known, uniforms = clips(model)

    def run(scale: float, bonus: float) -> Tensor:
        some = Conditioning.from_tokens(TEXTS, GUIDES, PAD, guidance_scale=scale, text_bonus=bonus)
        return Engine(model).generate(program, known, some, RecordingSampler(), uniforms)

    assert torch.equal(run(0.0, 1.4), run(0.0, 0.0))
    assert not torch.equal(run(1.0, 1.4), run(1.0, 0.0))


def test_the_trunk_alone_is_the_image_model() -> None:
    """Stage 1 without its temporal channel samples the same first frame as its trunk."""
    stage1, trunk = tiny.model("sequential"), tiny.model("image")
    trunk.load_state_dict({name: stage1.state_dict()[name] for name in trunk.state_dict()})
    outputs = []
    for model in (stage1, trunk):
        program = build_program(model.config, sequential(model.config.layout, (), (0,)), temporal=False)
        assert program.spatial_capacity == program.tokens_per_clip == 16
        uniforms = torch.from_numpy(np.random.default_rng(1).random((2, 16, 2)))
        sampler = RecordingSampler()
        Engine(model).generate(
            program, torch.zeros(2, 16, dtype=torch.int64), conditioning(None, 1.4), sampler, uniforms
        )
        outputs.append(torch.cat(sampler.logits, dim=1))
    torch.testing.assert_close(*outputs)


def test_training_mode_is_refused() -> None:
    model = tiny.model("sequential").train()
    program = build_program(replace(model.config), plain(model.config.layout))
    with pytest.raises(AssertionError, match="eval"):
        Engine(model).generate(program, *clips(model)[:1], conditioning(), RecordingSampler(), clips(model)[1])


class KeepingBackend(EagerBackend):
    """Keeps batches as the compiled backend does, on a device that runs out of memory where it is told to."""

    keeps_batches = True

    def __init__(self, model: CogVideoTransformer) -> None:
        super().__init__(model)
        self.fails_at: int | None = None
        """Step before which there is no memory."""

    def decode(self, steps: Sequence[DecodeInputs]) -> list[Tensor | Exception]:
        if self.fails_at is not None:
            self.fails_at -= 1
            if self.fails_at < 0:
                self.fails_at = None
                raise torch.OutOfMemoryError("no memory")
        return super().decode(steps)


@pytest.mark.parametrize("step", [0, 5])
def test_memory_kept_for_later_is_released_when_a_step_has_none(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "keeping", KeepingBackend)
    model = tiny.model("sequential")
    engine, (known, uniforms) = Engine(model, "keeping"), clips(model)
    backend = engine.backend
    assert isinstance(backend, KeepingBackend)
    program, counts = build_program(model.config, plain(model.config.layout)), list[int]()
    expected = engine.generate(program, known, conditioning(), ClusterSampler(*SAMPLING), uniforms)
    assert len(engine._kept) == 1
    backend.fails_at = step
    sampler = RecordingSampler()  # another kind of batch, so that the kept one is not used
    tokens = engine.generate(program, known, conditioning(), sampler, uniforms, counts.append)
    assert torch.equal(tokens, expected)
    assert sum(counts) == 2 * program.tokens_per_clip, "tokens that were drawn again are counted once"
    assert [kind.sampler for kind in engine._kept] == [sampler]
    engine._kept.clear()
    backend.fails_at = step
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(program, known, conditioning(), sampler, uniforms)


def test_what_another_thread_released_is_tried_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "keeping", KeepingBackend)
    model = tiny.model("sequential")
    engine, (known, uniforms) = Engine(model, "keeping"), clips(model)
    program, prefill = build_program(model.config, plain(model.config.layout)), engine.prefill
    engine.generate(program, known, conditioning(), RecordingSampler(), uniforms)

    def prefill_without_memory(*words: Any) -> Tensor | None:
        monkeypatch.undo()
        with pytest.raises(torch.OutOfMemoryError, match="there"):  # another thread
            with_kept_memory_released(engine.device, no_memory_elsewhere)
        assert not engine._kept
        raise torch.OutOfMemoryError("no memory")

    def no_memory_elsewhere() -> None:
        raise torch.OutOfMemoryError("no memory there")

    monkeypatch.setattr(engine, "prefill", prefill_without_memory)
    engine.generate(program, known, conditioning(), RecordingSampler(), uniforms)
    assert engine.prefill == prefill


def test_memory_that_another_engine_keeps_is_released_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "keeping", KeepingBackend)
    model = tiny.model("sequential")
    first, second, (known, uniforms) = Engine(model, "keeping"), Engine(model, "keeping"), clips(model)
    program = build_program(model.config, plain(model.config.layout))
    expected = first.generate(program, known, conditioning(), RecordingSampler(), uniforms)
    assert isinstance(second.backend, KeepingBackend)
    second.backend.fails_at = 3
    assert len(first._kept) == 1
    assert torch.equal(second.generate(program, known, conditioning(), RecordingSampler(), uniforms), expected)
    assert not first._kept


def test_a_failed_batch_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a cycle of its error and the frames that raised it either, which would live until garbage collection."""
    monkeypatch.setitem(BACKENDS, "keeping", KeepingBackend)
    model = tiny.model("sequential")
    engine, (known, uniforms) = Engine(model, "keeping"), clips(model)
    backend, caches = engine.backend, list[weakref.ref[KVCache]]()
    assert isinstance(backend, KeepingBackend)
    allocate = backend.allocate

    def watched(*words: int, **named: Any) -> KVCache:
        cache = allocate(*words, **named)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(backend, "allocate", watched)
    backend.fails_at = 3
    gc.disable()
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            engine.generate(
                build_program(model.config, plain(model.config.layout)),
                *(known, conditioning(), RecordingSampler(), uniforms),
            )
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()
