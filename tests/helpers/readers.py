"""Every reader of a single file that may come from a stranger, with small sound files to damage: `readers()`.

`tests/helpers/damage.py` damages them at random, `scripts/fuzz_readers.py` guided by coverage. Media are not here:
`scripts/check_hostile.py` makes hostile ones. Parquet is parsed in another process, of which coverage knows nothing.
"""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from cogvideo.checkpoint.format import Index
from cogvideo.config import dump_yaml, from_dict, load_config, to_dict
from cogvideo.data.published_rows import PublishedRows
from cogvideo.data.readers import open_captions
from cogvideo.data.shards import ShardFile
from cogvideo.files import open_npy, read_json, read_npz
from cogvideo.inference.sampler import load_labels
from cogvideo.locks import Owner, _read_owner
from cogvideo.media.container import EXIF_ORIENTATION, exif_orientation_of
from cogvideo.model.config import ModelConfig
from cogvideo.sampling.bundle import BundleConfig
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.inputs import InputReader
from cogvideo.sequence.layout import Vocabulary
from cogvideo.tensor_file import read_header
from cogvideo.text import read_prompts
from cogvideo.tokenizers.icetk import read_image_weights
from cogvideo.tokenizers.image import ImageTokenizerConfig
from cogvideo.tokenizers.text import TextTokenizer, parse_model
from cogvideo.torch_archive import read_module
from cogvideo.training.config import TrainConfig
from cogvideo.training.metrics import MetricsFile

CAPTIONS = [
    {"video": "a.mp4", "caption": "the red digit 3", "start": 0.5, "end": 2, "extra": {"x": [1, None]}},
    {"video": "b/c.mp4", "caption": ["one", "二"], "start": None, "end": None, "extra": "0:01"},
]


@dataclass(frozen=True)
class Reader:
    """`read` returns, or raises a ValueError or OSError of one line that names the file."""

    suffix: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], Any]


class FakeTokenizer:
    """Stands for an `ImageTokenizer` of 16 codes; media are not read with it."""

    num_tokens = 16
    compress_rate = 8


def readers(scratch: Path) -> dict[str, Reader]:
    """By name."""
    return {
        "captions-csv": Reader(".csv", _tables(","), _read_captions),
        "captions-json": Reader(".json", _json_captions(), _read_captions),
        "captions-jsonl": Reader(".jsonl", (_lines(CAPTIONS),), _read_captions),
        "captions-tar": Reader(".tar", (_tar(tarfile.GNU_FORMAT), _tar(tarfile.PAX_FORMAT)), _read_captions),
        "captions-tsv": Reader(".tsv", _tables("\t"), _read_captions),
        "sidecar": Reader(".json", tuple(json.dumps(c).encode() for c in CAPTIONS), _read_sidecar),
        "prompts": Reader(".txt", ("a red digit\n\n数字 3\n".encode(), "\ufeffx\r\ny".encode()), read_prompts),
        "published-rows": Reader(".bin", (_rows(),), _read_rows),
        "published-checkpoint": Reader(".pt", (_archive(),), read_module),
        "published-image-tokenizer": Reader(".pt", (_archive(),), read_image_weights),
        "config-bundle": Reader(".json", (_json(BundleConfig()),), partial(_read_config, BundleConfig)),
        "config-model": Reader(".json", (_json(ModelConfig()),), partial(_read_config, ModelConfig)),
        "config-image-tokenizer": Reader(
            ".json", (_json(ImageTokenizerConfig()),), partial(_read_config, ImageTokenizerConfig)
        ),
        "config-sampling": Reader(".yaml", _yaml(SampleConfig()), partial(_read_stored, SampleConfig)),
        "config-train": Reader(
            ".yaml", _yaml(TrainConfig(run_dir=Path("run"), task="image")), partial(_read_given, TrainConfig)
        ),
        "json-shard": Reader(
            ".json",
            (b'{"rows": 2, "files": {"x": {"bytes": 3, "sha256": "0"}}, "skipped": [{"video": "a", "reason": "x"}]}',),
            lambda path: read_json(path, ShardFile),
        ),
        "json-index": Reader(
            ".json", (b'{"weight_map": {"a": "b"}, "files": {}}',), lambda path: read_json(path, Index)
        ),
        "lock": Reader(".json", (json.dumps(asdict(Owner())).encode(),), _read_owner),
        "metrics": Reader(
            ".jsonl", (b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1e3, "time": "x"}\n',), _read_metrics
        ),
        "npy": Reader(".npy", (_npy(np.arange(6, dtype="<u2").reshape(2, 3)),), _read_npy),
        "npz": Reader(".npz", (_npz(),), read_npz),
        "labels": Reader(".npy", (_npy(np.arange(16) % 3),), lambda path: load_labels(path, 16)),
        "tensors": Reader(".safetensors", (_tensors(), _tokens()), read_header),
        "tokens": Reader(".safetensors", (_tokens(),), _read_tokens),
        "text-model": Reader(".model", _text_models(scratch), _read_text_model),
        "exif": Reader(".jpg", tuple(map(_picture, ("JPEG", "PNG", "TIFF", "WEBP"))), exif_orientation_of),
        **_parquet(),
    }


def _read_captions(path: Path) -> None:
    captions = open_captions(path, skip_bad=True)
    captions.select(range(len(captions)))
    captions.bad_reasons()
    captions.group_by_video()


def _read_sidecar(path: Path) -> None:
    path.with_suffix(".mp4").touch()
    _read_captions(path.parent)


def _read_rows(path: Path) -> None:
    rows = PublishedRows(path, text_len=4, num_frames=2, frame_len=4, vocabulary=Vocabulary())
    rows.batch(range(len(rows)))


def _read_config(shape: type, path: Path) -> None:
    to_dict(from_dict(shape, read_json(path, dict[str, Any]), str(path)))


def _read_stored(shape: type, path: Path) -> None:
    dump_yaml(load_config(shape, stored=path))


def _read_given(shape: type, path: Path) -> None:
    dump_yaml(load_config(shape, [path]))


def _read_metrics(path: Path) -> None:
    MetricsFile(path).read()


def _read_npy(path: Path) -> None:
    open_npy(path, ("<u2", "<i8"), (None, None)).sum()


def _read_tokens(path: Path) -> None:
    InputReader(FakeTokenizer(), 2).read([path])  # type: ignore[arg-type]


def _read_text_model(path: Path) -> None:
    tokenizer = TextTokenizer.load(path)
    ids = tokenizer.encode("the red digit 3\n数字 <start_of_image> \ue000 e\u0301")
    tokenizer.decode(ids)
    tokenizer.decode(range(tokenizer.num_image_tokens, tokenizer.vocabulary.size))


def _json(config: Any) -> bytes:
    return json.dumps(to_dict(config)).encode()


def _yaml(config: Any) -> tuple[bytes, ...]:
    required = "run_dir: $HOME/x\ntask: image\n" if isinstance(config, TrainConfig) else "seconds: !!float '4'\n"
    return dump_yaml(config).encode(), f"# note\n{required}".encode()


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _json_captions() -> tuple[bytes, ...]:
    columns = {"video": {"0": "a.mp4"}, "caption": {"0": "x"}}
    named = {"a.mp4": "one", "b.mp4": ["x", "y"], "c.mp4": {"caption": "z", "start": 2.0}}
    return tuple(json.dumps(value).encode() for value in (CAPTIONS, columns, named))


def _tables(delimiter: str) -> tuple[bytes, ...]:
    rows = [["path", "caption", "start", "end"], ["a.mp4", '"one, ""two""\n three"', "0:01", ""]]
    quoted = "\n".join(delimiter.join(row) for row in rows)
    plain = delimiter.join(["a.mp4", "['one']"])
    named = f"sep=;\n{quoted}".replace(delimiter, ";") if delimiter == "," else plain
    return quoted.encode(), plain.encode(), quoted.encode("utf-16"), named.encode()


def _tar(format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in (("a.mp4", b"video"), ("a.txt", b"one"), (f"{'long' * 40}.mp4", b"x"), ("b/c.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()[:8192]


def _rows() -> bytes:
    row = [Vocabulary().pad, *[Vocabulary().newline] * 3, *range(8)]
    return np.array([row, row], np.int32).tobytes()


def _archive() -> bytes:
    stream = io.BytesIO()
    state = {"module": {"a": torch.zeros(2, 3), "b": torch.ones(2).half()}, "shapes": [torch.Size([1])], "x": {1, "s"}}
    torch.save(state, stream)
    return stream.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, facts=np.array("{}"), visible=np.ones((2, 3), bool))
    return stream.getvalue()


def _tensors() -> bytes:
    return save({"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.int64)}, {"x": "y"})


def _tokens() -> bytes:
    tokens = torch.arange(8, dtype=torch.uint8).reshape(1, 2, 4)
    return save({"tokens": tokens, "seconds": torch.tensor(4.0)}, {"samples": '[{"prompt": "a", "number": 0}]'})


def _text_models(scratch: Path) -> tuple[bytes, ...]:
    path = scratch / "text.model"
    TextTokenizer.train(["the red digit 3", "the blue digit 5"], path, 310, 16)
    small = parse_model(path.read_bytes())
    small.normalizer_spec.ClearField("precompiled_charsmap")  # 240 kB
    return small.SerializeToString(), path.read_bytes()


def _picture(format: str) -> bytes:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (3, 2)).save(stream, format, exif=exif)
    return stream.getvalue()


def _parquet() -> dict[str, Reader]:
    """None without PyArrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return {}
    stream = io.BytesIO()
    table = pyarrow.table({"video": ["a.mp4", "b.mp4"], "caption": ["one", "二"], "start": [0.5, None], "x": [[1], []]})
    pyarrow.parquet.write_table(table, stream)
    return {"captions-parquet": Reader(".parquet", (stream.getvalue(),), _read_captions)}
