"""Starting weights made parameter by parameter: the same values as a whole model would have, without its memory."""

import dataclasses
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.checkpoint.load import save_model
from cogvideo.checkpoint.parameters import parameter_shapes
from cogvideo.config import from_dict, load_config
from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import draw_parameters, inherit_trunk, inherited_values, initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.rng import generator_for
from cogvideo.tokenizers.image import open_image_tokenizer
from cogvideo.training.config import TrainConfig
from cogvideo.training.construction import CheckpointTensors, Values, construct, starting_values
from tests.helpers.bundles import write_image_tokenizer
from tests.helpers.models import VARIANTS, tiny_config, tiny_model

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[3] / "configs"


def no_values(model: CogVideoTransformer, folder: Path) -> Values:
    raise AssertionError("nothing to start from")


def run_config(**groups: dict[str, Any]) -> TrainConfig:
    return from_dict(TrainConfig, groups)


def equal(model: CogVideoTransformer, expected: CogVideoTransformer) -> bool:
    own, other = dict(model.named_parameters()), dict(expected.named_parameters())
    return own.keys() == other.keys() and all(torch.equal(own[name], p) for name, p in other.items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", ["fp32", "dtype"])
def test_random_weights_are_those_of_a_whole_model(variant: str, weights: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    run = run_config(train={"seed": 3, "dtype": "bf16", "weights": weights}, init={"mix_logit": 0.5})
    whole = CogVideoTransformer(config)
    initialise(whole, generator_for(3, "initialise"), mix_logit=0.5)
    model = construct(lambda: CogVideoTransformer(config), run, CPU, no_values)
    assert equal(model, whole.bfloat16() if weights == "dtype" else whole)
    assert all(p.requires_grad for p in model.parameters())


def test_image_embeddings_from_codebooks(tmp_path: Path) -> None:
    """Similar codes have similar embeddings, in one codebook or in each of two; all else is as without them."""
    config = tiny_config(hidden_size=256)
    count = config.vocabulary.num_image_tokens
    paths = {"image_tokenizer": tmp_path / "small", "high_res_tokenizer": tmp_path / "large"}
    angles = {}
    for seed, (key, path) in enumerate(paths.items()):
        codes = open_image_tokenizer(write_image_tokenizer(path, seed, count)).codebook
        codes = codes - codes.mean(0)
        angles[key] = F.cosine_similarity(codes[:, None], codes, dim=2)

    def embeddings(data: dict[str, Any], **init: bool) -> Tensor:
        run = run_config(task="superres", data=data, init=init)
        model = construct(lambda: CogVideoTransformer(config), run, CPU, no_values)
        return model.word_embeddings.weight.detach()

    def correlation(rows: Tensor, angles: Tensor) -> float:
        other = ~torch.eye(count, dtype=torch.bool)
        of_rows = F.cosine_similarity(rows[:count, None], rows[:count], dim=2)
        return float(torch.corrcoef(torch.stack([of_rows[other], angles[other]]))[0, 1])

    given = {key: str(path) for key, path in paths.items()}
    random, both = embeddings(given), embeddings(given, codebook=True)
    small = embeddings({"image_tokenizer": given["image_tokenizer"]}, codebook=True)
    assert torch.equal(random[count:], both[count:]) and torch.equal(random[count:], small[count:])
    for rows in (both, small):
        assert float(rows[:count].std()) == pytest.approx(0.02, rel=0.05)
    assert correlation(small, angles["image_tokenizer"]) > 0.9
    assert all(correlation(both, of_one) > 0.5 for of_one in angles.values())
    assert abs(correlation(random, angles["image_tokenizer"])) < 0.2


def test_codebooks_of_another_size_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    other = write_image_tokenizer(tmp_path / "other", num_codes=config.vocabulary.num_image_tokens + 1)
    run = run_config(data={"image_tokenizer": str(other)}, init={"codebook": True})
    with pytest.raises(ValueError, match=r"data.image_tokenizer has \d+ codes, but the text tokenizer expects \d+"):
        construct(lambda: CogVideoTransformer(config), run, CPU, no_values)


@pytest.mark.parametrize("temporal", ["qkv", "qkv_and_dense"])
def test_a_frozen_int8_trunk_and_random_extras_are_those_of_a_whole_model(temporal: Any, tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS["sequential"])
    trunk = tiny_model(dataclasses.replace(config, task="image"), seed=5)
    save_model(tmp_path / "trunk", trunk)
    whole = CogVideoTransformer(config)
    initialise(whole, generator_for(0, "initialise"))
    inherit_trunk(whole, dict(trunk.named_parameters()), temporal_init=temporal)
    whole.freeze_trunk()
    whole.quantize_trunk()

    def values(model: CogVideoTransformer, folder: Path) -> Values:
        return starting_values(
            model,
            folder,
            loads_all_parameters=lambda checkpoint: False,
            inherit=lambda checkpoint, tensors: inherited_values(model, tensors, temporal_init=temporal),
        )

    run = run_config(init={"checkpoint": str(tmp_path / "trunk"), "freeze_trunk": True, "trunk_weights": "int8"})
    model = construct(lambda: CogVideoTransformer(config), run, CPU, values)
    assert equal(model, whole)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), whole.buffers(), strict=True))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in whole.extra_parameters()}


@pytest.mark.parametrize("hidden", [1, 3, 16, 20])
def test_skipped_numbers_do_not_change_the_others(hidden: int) -> None:
    """Sizes below and above 16, and multiples of it or not: torch draws them differently."""
    config = tiny_config(hidden_size=hidden, num_heads=1)
    model = CogVideoTransformer(config)
    every = dict(draw_parameters(model, torch.Generator().manual_seed(1)))
    assert list(every) == sorted(every) and len(every) == sum(1 for _ in model.parameters())
    skipped = {name for index, name in enumerate(every) if index % 3}
    some = dict(draw_parameters(model, torch.Generator().manual_seed(1), skip=skipped))
    assert some.keys() == every.keys() - skipped
    assert all(torch.equal(value, every[name]) for name, value in some.items())


class MetaTrunk(Mapping[str, Tensor]):
    """A trunk's tensors in float32, without memory; counts how many bytes of them are alive."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = parameter_shapes(config)
        self.alive = self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], device="meta")
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._freed, tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _freed(self, count: int) -> None:
        self.alive -= count


def test_the_full_size_reads_one_tensor_at_a_time_into_its_final_type() -> None:
    """The largest, the word embeddings, has 1.8 GB in float32, so a process needs less than 4 GB of host memory."""
    files = [CONFIGS / "train/paper_stage1.yaml", CONFIGS / "deepspeed/1x24gb.yaml"]
    run = load_config(TrainConfig, files, ["init.temporal=qkv_and_dense"])
    extra = {f"layers.{i}.mix_logit" for i in range(run.model.num_layers)}
    trunk = MetaTrunk(dataclasses.replace(run.model, task="image"))

    def values(model: CogVideoTransformer, folder: Path) -> Values:
        inherited = inherited_values(model, trunk)
        assert {name for name, _ in model.named_parameters()} - inherited.keys() == extra  # nothing large is drawn
        return inherited

    model = construct(lambda: CogVideoTransformer(run.model), run, torch.device("meta"), values)
    assert sum(p.nbytes for p in model.parameters()) == 2 * 7_721_127_936
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert trunk.alive == 0 and trunk.most <= 2e9


MEASURE = """
import torch
from cogvideo.config import from_dict
from cogvideo.model.config import ModelConfig
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.layout import Vocabulary
from cogvideo.training.config import TrainConfig
from cogvideo.training.construction import construct

words = Vocabulary(size=30000, num_image_tokens=20000, pad=20003, newline=20004, start_of_image=29000)
sizes = dict(hidden_size=256, num_heads=4, vocabulary=words)
run = from_dict(TrainConfig, {"train": {"dtype": "bf16", "weights": "dtype"}})

def peak():
    # not getrusage, whose maximum includes that of the process that started this one
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

def make(layers):
    config = ModelConfig(num_layers=layers, **sizes)
    return construct(lambda: CogVideoTransformer(config), run, torch.device("cpu"), None)

make(1)  # whatever is imported late
before = peak()
model = make(48)
count = sum(p.numel() for p in model.parameters())
print(count, peak() - before)
"""


def test_host_memory_stays_far_below_the_float32_model() -> None:
    """The model itself takes half of it in bfloat16; the rest is for one parameter at a time."""
    shown = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True).stdout
    count, grown = map(int, shown.split())
    assert count > 50e6
    assert count < grown < 0.75 * 4 * count


def test_a_checkpoint_is_unmapped_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvideo.checkpoint.format import Checkpoint, load_checkpoint
    from cogvideo.training import construction

    save_model(tmp_path / "model", tiny_model(tiny_config()))
    released = []
    monkeypatch.setattr(construction, "RELEASE_BYTES", 4096)
    monkeypatch.setattr(Checkpoint, "release", lambda self: released.append(self))
    tensors = CheckpointTensors(load_checkpoint(tmp_path / "model"))
    total = sum(tensors[name].nbytes for name in tensors)
    assert len(released) >= total // 4096 // 8 > 0
