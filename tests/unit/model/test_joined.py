"""Text and frames as one sequence: its blocks, and attention by FlexAttention and in full against that by blocks."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_mask

from cogvideo.inference.backends import KVCache
from cogvideo.inference.engine import Conditioning, Engine, build_program
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import sequential
from cogvideo.kernels import cpu
from cogvideo.model import joined
from cogvideo.model.config import ModelConfig
from cogvideo.model.inputs import TextBias
from cogvideo.model.joined import JoinedPlan, attend_dense, plan_joined
from cogvideo.model.masks import channel_masks
from cogvideo.model.plan import GivenWindows, plan_clip
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import frame_inputs
from tests.helpers import decoding as tiny
from tests.helpers.models import VARIANTS, tiny_batch, tiny_config, tiny_model


def joined_plans(config: ModelConfig, *, last: bool = False) -> list[JoinedPlan]:
    """The spatial plan, and the temporal ones; with `last` those of the last layer."""
    plan = plan_clip(config, supervised_only=True, plan_type="joined")
    channels = [plan.spatial, *plan.temporal]
    if last:
        assert plan.last is not None and plan.last.temporal is not None
        channels = [plan.last.spatial, plan.last.temporal]
    assert all(isinstance(channel, JoinedPlan) for channel in channels)
    return channels  # type: ignore[return-value]


def test_blocks_that_are_computed_at_the_published_size() -> None:
    """In stage 2 windows are neighbours: in the order of slots, 188 and 184 temporal blocks would count."""
    stage1, stage2 = ModelConfig(), ModelConfig(task="interpolation", window_size=10)
    for config, expected in (
        (stage1, [60, 153]),
        (stage2, [78, 81, 67]),
        (ModelConfig(task="image", num_frames=1), [10]),
    ):
        counts = [plan.with_text(64).num_blocks for plan in joined_plans(config)]
        side = -(-(64 + config.layout.num_slots) // 128)
        assert counts == [(count, side**2) for count in expected]


def test_a_picture_of_the_blocks() -> None:
    config = ModelConfig(task="interpolation", window_size=10)
    picture = joined_plans(config)[1].with_text(64).picture().splitlines()
    assert len(picture) == 17 and {*"".join(picture)} == {*".+#"}
    assert picture[0] == "+++.............."  # text sees text; the first window's given frames see each other


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("last", [False, True])
def test_the_mask_inside_blocks_is_the_predicate(variant: str, last: bool) -> None:
    config = tiny_config(**VARIANTS[variant])
    layout, text_len = config.layout, 5
    if last and not layout.given_frames:
        pytest.skip("the last layer is like the others")
    spatial, by_layer = channel_masks(layout, config.window_size)
    masks = [spatial, *(by_layer if config.has_temporal_channel else ())]
    if last:
        masks = [spatial, by_layer[(config.num_layers - 1) % len(by_layer)]]
    for mask, plan in zip(masks, joined_plans(config, last=last), strict=True):
        rows = plan.with_text(text_len)
        got = create_mask(rows.blocks.mask_mod, 1, 1, len(rows.first), len(rows.place), device="cpu")[0, 0].numpy()
        slots = np.arange(layout.num_slots) if plan.order is None else plan.order.numpy()
        queries = slots if plan.queries is None else slots[plan.queries.numpy()]
        expected = mask.allowed(queries[:, None], slots)
        frames = got if plan.queries is not None else got[text_len:]
        assert frames[:, :text_len].all() and np.array_equal(frames[:, text_len:], expected)
        if plan.queries is None:
            assert got[:text_len, :text_len].all() and not got[:text_len, text_len:].any()
        outputs = queries if plan.restore is None else queries[plan.restore.numpy()]
        assert np.array_equal(outputs, layout.slots_of(*layout.supervised_frames) if last else queries)


def test_masks_are_made_once_per_text_length_and_serve_training_after_scoring() -> None:
    plan = joined_plans(tiny_config("interpolation", window_size=2))[1]
    with torch.inference_mode():
        first = plan.with_text(6)
    assert plan.with_text(6) is first and plan.with_text(7) is not first
    assert not first.place.is_inference()


def losses_and_gradients(model: CogVideoTransformer, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    model.use_attention(name)
    model.zero_grad()
    losses = model.token_losses(tiny_batch(model.config, 3))
    losses.mean().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention has no backward kernel for a CPU and refuses; its unfused form has a backward pass."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(joined, "_has_kernel", lambda *inputs: True)
    monkeypatch.setattr(joined, "_compiled_flex", lambda: torch_flex.flex_attention)
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("name", "frozen"), [("dense", False), ("dense", True), ("flex", True)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_blocks(
    name: str, variant: str, frozen: bool, flex_with_gradients: None
) -> None:
    """Three clips with texts of different lengths; FlexAttention in its unfused form."""
    model = tiny_model(tiny_config(**VARIANTS[variant], num_layers=2)).double().train()
    model.freeze_trunk(frozen and model.config.has_temporal_channel)
    losses, gradients = losses_and_gradients(model, name)
    expected, wanted = losses_and_gradients(model, "sdpa")
    torch.testing.assert_close(losses, expected)
    assert gradients.keys() == wanted.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[parameter])


def scores(model: CogVideoTransformer, name: str) -> Tensor:
    """Hidden states of three clips with padded texts and a bonus on each text of its own."""
    model.use_attention(name)
    batch = tiny_batch(model.config, 3)
    bias = TextBias.from_mask(batch.text_mask, torch.tensor([[1.4], [0.0], [0.3]]), 0.7)
    plan = model.plan_clip(torch.device("cpu"), supervised_only=True)
    return model(frame_inputs(batch.frames, model.config.vocabulary.start_of_image), plan, bias, text=batch.text)


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_text_bonus_is_for_frame_rows(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    torch.testing.assert_close(scores(model, "dense"), scores(model, "sdpa"), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler here")
@torch.inference_mode()
@pytest.mark.parametrize("variant", ["sequential", "interpolation"])
def test_compiled_flex_attention_is_equal(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant], hidden_size=64))
    torch.testing.assert_close(scores(model, "flex"), scores(model, "sdpa"), atol=1e-5, rtol=1e-5)


def test_dropout_and_gradients_on_a_cpu_take_the_dense_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def recording(*inputs: Tensor, **named: Tensor) -> Tensor:
        calls.append(float(inputs[-1]))
        return attend_dense(*inputs, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(joined, "attend_dense", recording)
    model = tiny_model(tiny_config("sequential", attention_dropout=0.3, num_layers=2)).train()
    model.use_attention("flex")
    with torch.no_grad():
        model.token_losses(tiny_batch(model.config))
    assert calls == [0.3] * 4
    model.eval().token_losses(tiny_batch(model.config))
    assert calls == [0.3] * 4 + [0.0] * 4


def test_dense_dropout_keeps_the_mean() -> None:
    """With values of one, the output is the sum of the remaining probabilities: one on average, and never just one."""
    torch.manual_seed(0)
    mask = joined_plans(tiny_config())[1].with_text(4)
    query, key = torch.randn(8, 4, 84, 8), torch.randn(8, 4, 84, 8)
    out = attend_dense(query, key, torch.ones_like(key), torch.zeros(8, 4), mask, 0.25)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.std().item() > 0.05


def test_text_beside_a_frozen_trunk_needs_no_gradient() -> None:
    """It depends on frozen weights alone, although frame rows that learn are in the same products."""
    model = tiny_model(tiny_config("sequential")).train()
    model.use_attention("dense")
    seen: list[bool] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    for frozen in (True, False):
        model.freeze_trunk(frozen)
        model.token_losses(tiny_batch(model.config))
    assert seen == [False] * 3 + [True] * 3


def keeping(allocate: Callable[..., KVCache], caches: list[KVCache]) -> Callable[..., KVCache]:
    def allocate_and_keep(*sizes: int, **named: int) -> KVCache:
        caches.append(allocate(*sizes, **named))
        return caches[-1]

    return allocate_and_keep


@pytest.mark.parametrize("windows", ["cut", "wrapped"])
@pytest.mark.parametrize("half_precision_cache", [False, True])
def test_prefill_stores_the_same_keys_and_draws_the_same_tokens(
    windows: GivenWindows, half_precision_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of unequal lengths, guides, a bonus; the given frames' spatial keys are read and not stored."""
    if half_precision_cache:
        monkeypatch.setattr("cogvideo.inference.backends.cache_dtype", lambda model: torch.float16)
    model = tiny.model("interpolation", window_size=2)
    layout, rng = model.config.layout, np.random.default_rng(0)
    known = torch.from_numpy(rng.integers(tiny.NUM_CODES, size=(2, layout.num_slots)))
    uniforms = torch.from_numpy(rng.random((2, layout.num_slots, 2)))
    texts, guides = [tiny.encode("left"), tiny.encode("quickly right")], [tiny.encode("any")] * 2
    conditioning = Conditioning.from_tokens(texts, guides, tiny.VOCABULARY.pad, guidance_scale=3.0, text_bonus=0.5)
    sampler = ClusterSampler(np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)
    schedule = sequential(layout, layout.given_frames, layout.generation_order[:1])
    tokens, keys = [], []
    for name in ("sdpa", "dense"):
        model.use_attention(name)
        engine = Engine(model, "eager")
        program = build_program(model.config, schedule, given_windows=windows, joined=model.is_joined)
        assert program.given is not None and isinstance(program.given.temporal[0], JoinedPlan) == (name == "dense")
        caches: list[KVCache] = []
        monkeypatch.setattr(engine.backend, "allocate", keeping(engine.backend.allocate, caches))
        tokens.append(engine.generate(program, known, conditioning, sampler, uniforms))
        keys.append(torch.stack([channel.key for channel in caches[0].temporal]))
    assert torch.equal(*tokens)
    torch.testing.assert_close(*keys, atol=2e-3 if half_precision_cache else 1e-5, rtol=1e-3)


def test_keys_are_stored_at_the_positions_of_their_slots_or_nowhere() -> None:
    config = tiny_config("interpolation", window_size=2)
    given = config.layout.slots_of(*config.layout.given_frames)
    plan = plan_joined(channel_masks(config.layout, 2)[1][0], given, positions=np.arange(config.layout.num_slots))
    assert plan.cache_positions is not None and plan.order is not None
    assert np.array_equal(plan.cache_positions.numpy(), given[plan.order.numpy()])
    nowhere = plan_joined(channel_masks(config.layout, 2)[0], given, positions=np.full(80, -1))
    assert nowhere.cache_positions is None
