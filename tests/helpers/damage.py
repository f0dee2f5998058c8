"""Damaged folders and files of every kind that the package reads, by a seed, and how reading them ends.

One file of a good folder is changed: bytes flipped, cut, inserted; JSON values of other types, missing and repeated
keys, deep nesting, huge numbers; forged NPY headers. Half the time hashes are made to fit again, as a hostile author
would. `scripts/fuzz_files.py` does it thousands of times.
"""

import json
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.inspection import describe_files
from cogvideo.checkpoint.load import build_model
from cogvideo.config import to_dict
from cogvideo.data.dataset import ClipDataset, FrameDataset
from cogvideo.data.shards import read_shard, write_manifest
from cogvideo.distributed import ProcessGroup
from cogvideo.files import sha256_file, write_json
from cogvideo.logs import one_line
from cogvideo.sampling.bundle import load_sample_config, open_bundle
from cogvideo.sampling.inputs import InputReader
from cogvideo.sampling.outputs import write_tokens
from cogvideo.sampling.runner import RunDirectory
from cogvideo.tensor_file import TensorInfo, write_tensor_file
from cogvideo.training import checkpointing
from cogvideo.training.config import TrainConfig, changed_settings
from cogvideo.training.metrics import Averages, MetricsFile, draw_curves
from cogvideo.training.state import ENGINE_COUNTERS, tensor_hash
from tests.helpers.bundles import write_bundle
from tests.helpers.data import make_prepared
from tests.helpers.readers import Reader, readers

MAX_SECONDS = 30
IDENTITY = {"weights": "0", "prompts": ["a"]}
STEP = "step_00000002"
TENSORS = {"weights/a": torch.zeros(3, 4), "exp_avg/a": torch.ones(3, 4), "buffers/n": torch.arange(3)}


class State:
    """Stands for `TrainingState`."""

    has_ema = False

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo.of(tensor) for name, tensor in TENSORS.items()}

    def frozen_hashes(self) -> dict[str, str]:
        return {"trunk": "00"}

    def write(self, name: str, value: torch.Tensor) -> None:
        TENSORS[name].clone().copy_(value)

    def set_numbers(self, numbers: dict[str, Any]) -> None:
        for name in ENGINE_COUNTERS:
            torch.tensor(numbers["engine"][name])
        torch.zeros(()).fill_(float(numbers["optimiser_steps"]))
        dict(numbers["scaler"])


def make_run(folder: Path) -> Path:
    """A run folder: metrics and one checkpoint."""
    path = folder / "checkpoints" / STEP
    path.mkdir(parents=True)
    lines = [{"step": step, "loss": 1.0 / step, "loss/frame_1": 0.5} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sums = [{"loss": [1.0, 2.0]}]
    counters = dict.fromkeys(ENGINE_COUNTERS, 2)
    engine = {"engine": counters, "optimiser_steps": 2, "scaler": {"cur_scale": 1.0}}
    numbers = {"step": 2, "skipped": 0, "bad_in_a_row": 0, "averages": sums, "config": to_dict(TrainConfig(folder))}
    write_json(path / "state.json", numbers | {"engine": engine})
    name = "state-00001-of-00001.safetensors"
    write_tensor_file(path / name, State().infos(), TENSORS.__getitem__)
    files = {n: {"sha256": sha256_file(path / n), "size": (path / n).stat().st_size} for n in (name, "state.json")}
    hashes = {name: tensor_hash(tensor) for name, tensor in TENSORS.items()}
    header = {"format": checkpointing.FORMAT, "step": 2, "world": 1}
    write_json(path / "manifest.json", header | {"files": files, "tensors": hashes, "frozen": {"trunk": "00"}})
    return folder


def read_run(folder: Path) -> None:
    draw_curves(MetricsFile(folder / "metrics.jsonl").read(), folder / "curves.png")
    newest = checkpointing.newest_state(folder / "checkpoints")
    if newest is None:
        raise ValueError(f"{folder}: skipped with a warning")
    saved = checkpointing.load_state(State(), newest)  # type: ignore[arg-type]
    list(changed_settings(saved["config"], to_dict(TrainConfig(folder))))
    averages = Averages()
    for sums in saved["averages"]:
        averages.add(sums)
    averages.means()


def make_samples(folder: Path) -> Path:
    """A folder of results with an unfinished run in it."""
    run = RunDirectory(folder, IDENTITY, ProcessGroup())
    run.begin()
    run.batch_cache(0).store("x", torch.zeros(1, 5, 4, dtype=torch.int64))
    run.finish_group([0], torch.zeros(1, 5, 4, dtype=torch.int64))
    run.batch_cache(1).store("x", torch.zeros(1, 5, 4, dtype=torch.int64))
    write_tokens(
        folder / "tokens.safetensors", torch.zeros(1, 5, 4, dtype=torch.int64), 4.0, [{"prompt": "a", "number": 0}]
    )
    write_json(folder / "samples.json", {"made_from": run.digest, "samples": []})
    return folder


def read_samples(folder: Path, tokenizer: Any) -> None:
    InputReader(tokenizer, 2).read([folder])
    run = RunDirectory(folder, IDENTITY, ProcessGroup())
    run.begin(resume=True)
    run.batch_cache(1).load("x")
    run.gather(1)


def read_bundle(folder: Path) -> None:
    load_sample_config(folder, [], [])
    bundle = open_bundle(folder)
    bundle.text_tokenizer.decode(bundle.text_tokenizer.encode("the red digit 3\n数字"))
    bundle.image_tokenizer.decode(torch.zeros(1, 4, dtype=torch.int64))


def read_checkpoint(folder: Path) -> None:
    checkpoint = load_checkpoint(folder / "sequential")
    describe_files(checkpoint, verified=True)
    build_model(checkpoint)


def read_clips(folder: Path) -> None:
    clips = ClipDataset(folder)
    clips.frames(range(len(clips)))
    clips.texts(range(len(clips)))
    write_manifest(folder, {}, [read_shard(path) for path in sorted((folder / "shards").iterdir())])


def read_frames(folder: Path) -> None:
    frames = FrameDataset(folder)
    frames.frames(range(len(frames)))


def other_value(rng: random.Random) -> Any:
    deep: Any = 0
    for _ in range(300):
        deep = [deep]
    numbers = [0, 1, -1, 2**31, 2**53, 2**63, -(2**70), 10**30, 1.5, 1e308, float("nan"), float("inf")]
    texts = ["", "x", "..", "../../etc/passwd", "x" * 5000, "\0", "\ud800", "${oc.env:HOME}"]
    others = [None, True, [], {}, [1, 2, 3], [[]], {"a": 1}, deep, [0] * 2000]
    return rng.choice([*numbers, *texts, *others])


def change_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which one place is another type, gone, or new."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return other_value(rng)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    action = rng.random()
    if action < 0.1:
        del copy[key]
    elif action < 0.15 and isinstance(copy, dict):
        copy[str(other_value(rng))[:9]] = copy[key]
    else:
        copy[key] = change_value(rng, value[key])
    return copy


def forge_npy(rng: random.Random, data: bytes) -> bytes:
    shape = rng.choice(
        ["(40000000000000,)", "(-1,)", "(12,5,4)", "(12,)", "()", "(2**63,)", "(1e9,)", "(12,-5,-4)", "(0,)"]
    )
    kind = rng.choice(
        ["'<u2'", "'>u2'", "'|O'", "'<f8'", "'<i8'", "[('a','<i4')]", "'<M8[s]'", "'|V0'", "'|S0'", "3", "'x'"]
    )
    header = f"{{'descr': {kind}, 'fortran_order': {rng.choice([True, False])}, 'shape': {shape}, }}"
    header = rng.choice([header, header, "[" * 3000, "{" + header, header[:-2]])
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    magic = rng.choice([b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00", b"NUMPY", b"PK\x03\x04"])
    return magic + len(text).to_bytes(2, "little") + text + data[rng.choice([80, 128]) :]


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    action = rng.randrange(5)
    if action == 0:
        return data[:at]
    if action == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if action == 2:
        return rng.choice([b"RIFF", b"PK\x03\x04", b"\x93NUMPY", b"{", b"\x80\x02"]) + data
    changed = bytearray(data)
    for _ in range(1 if action == 3 else rng.randrange(2, 40)):
        if changed:
            changed[rng.randrange(min(len(changed), rng.choice([16, 300, 1 << 30])))] = rng.randrange(256)
    return bytes(changed)


def damage(rng: random.Random, path: Path) -> None:
    """Change one file."""
    data = path.read_bytes()
    structured = rng.random() < 0.6
    if structured and path.suffix == ".json":
        text = json.dumps(change_value(rng, json.loads(data))).encode()
        path.write_bytes(text.replace(b"1", b"1" + b"0" * 400, 1) if rng.random() < 0.05 else text)
    elif structured and path.suffix == ".jsonl":
        lines = data.splitlines() or [b"{}"]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(change_value(rng, json.loads(lines[at]))).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif structured and path.suffix == ".npy":
        path.write_bytes(forge_npy(rng, data))
    elif structured and path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        text = json.dumps(change_value(rng, json.loads(data[8 : 8 + length]))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    else:
        path.write_bytes(damage_bytes(rng, data))


def mend_hashes(folder: Path, changed: Path) -> None:
    """Let manifests fit the changed file, as far as they are still JSON of their shape."""
    entry = {"sha256": sha256_file(changed), "size": changed.stat().st_size, "bytes": changed.stat().st_size}
    try:
        if (folder / "bundle.json") != changed and (folder / "bundle.json").is_file():
            about = json.loads((folder / "bundle.json").read_bytes())
            (folder / "bundle.json").write_text(json.dumps(about | {"sha256": {}}))
        for name in ("manifest.json", "shard.json"):
            manifest = changed.parent / name
            if manifest != changed and manifest.is_file():
                content = json.loads(manifest.read_bytes())
                content["files"][changed.name] = entry
                manifest.write_text(json.dumps(content))
        top = folder / "manifest.json"
        if top.is_file() and top != changed and changed.parent.parent.name == "shards":
            content = json.loads(top.read_bytes())
            for shard in content["shards"]:
                if shard["name"] == changed.parent.name:
                    shard["files"][changed.name] = entry
            top.write_text(json.dumps(content))
    except (ValueError, KeyError, TypeError):
        pass


Kind = tuple[Callable[[Path], Any], Callable[[Path], Any]]


def kinds(scratch: Path) -> dict[str, Kind]:
    """By name: what makes a good folder, and what reads it."""
    bundle = write_bundle(scratch / "bundle", num_layers=1)
    write_json(bundle / "bundle.json", {"sha256": {"text.model": sha256_file(bundle / "text.model")}})
    np.save(bundle / "clusters.npy", np.arange(32))
    tokenizer = open_bundle(bundle).image_tokenizer

    def copy(folder: Path) -> None:
        shutil.copytree(bundle, folder)

    def copy_stage(folder: Path) -> None:
        shutil.copytree(bundle / "sequential", folder / "sequential")

    return {
        "bundle": (copy, read_bundle),
        "checkpoint": (copy_stage, read_checkpoint),
        "clips": (lambda folder: make_prepared(folder), read_clips),
        "frames": (lambda folder: make_prepared(folder, "frames"), read_frames),
        "run": (make_run, read_run),
        "samples": (make_samples, lambda folder: read_samples(folder, tokenizer)),
        **{name: kind_of(reader) for name, reader in readers(scratch).items()},
    }


def kind_of(reader: Reader) -> Kind:
    """A folder of sound files that one reader reads."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for number, data in enumerate(reader.seeds):
            (folder / f"{number}{reader.suffix}").write_bytes(data)

    def read(folder: Path) -> None:
        for path in sorted(folder.glob(f"?{reader.suffix}")):
            reader.read(path)

    return make, read


def fuzz(kind: Kind, count: int, seed: int, scratch: Path) -> tuple[Counter[str], dict[str, str]]:
    """Outcomes by class, and what went wrong: an example by its description."""
    make, read = kind
    outcomes: Counter[str] = Counter()
    faults: dict[str, str] = {}
    whole, broken = scratch / "whole", scratch / "broken"
    make(whole)
    read(shutil.copytree(whole, broken))  # so that a failure below is the damage's
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        shutil.rmtree(broken)
        shutil.copytree(whole, broken)
        name = rng.choice(files)
        damage(rng, broken / name)
        if rng.random() < 0.5:
            mend_hashes(broken, broken / name)
        started = time.perf_counter()
        try:
            read(broken)
            outcomes["read"] += 1
        except (ValueError, OSError) as error:
            outcomes["refused"] += 1
            if not any(part in one_line(error) for part in ("broken", "cached batch")) or len(one_line(error)) > 2000:
                faults.setdefault(f"{name}: names no file, or is long: {one_line(error)[:300]}", f"#{number}")
        except BaseException as error:
            outcomes[type(error).__name__] += 1
            at = traceback.extract_tb(error.__traceback__)[-1]
            faults.setdefault(
                f"{name}: {type(error).__name__} {str(error)[:100]!r} {at.filename}:{at.lineno}", f"#{number}"
            )
        seconds = time.perf_counter() - started
        if seconds > MAX_SECONDS:
            faults.setdefault(f"{name}: took {seconds:.0f} s", f"#{number}")
    return outcomes, faults
