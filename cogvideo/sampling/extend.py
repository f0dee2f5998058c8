"""A bundle with a larger vocabulary, for finetuning on captions whose words it spells out.

The ids of old pieces and their embeddings stay, so old prompts give the same tokens. The embedding of a new piece
starts as the mean of those that its text took before.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo.checkpoint.format import Checkpoint, load_checkpoint, save_checkpoint
from cogvideo.checkpoint.load import stored_config
from cogvideo.config import from_dict, to_dict
from cogvideo.files import atomic_directory, read_json, sha256_file, write_json
from cogvideo.sampling.bundle import MODELS, SUPERRES, BundleConfig, open_tokenizers
from cogvideo.tokenizers.records import TokenizerRecords
from cogvideo.tokenizers.text import TextTokenizer

EMBEDDINGS = "word_embeddings.weight"


def extend_bundle(directory: Path, tokenizer: TextTokenizer, out: Path, *, overwrite: bool = False) -> None:
    """Write a copy of a bundle with `tokenizer`, which the bundle's own one was `extended` to.

    The folder appears complete or not at all. Raises: FileExistsError; FileNotFoundError, ValueError for a damaged
    bundle.
    """
    old, _, _ = open_tokenizers(directory)
    names = [name for name in (*MODELS, *SUPERRES.values()) if (directory / name).is_dir()]
    models = {name: load_checkpoint(directory / name) for name in names}
    with atomic_directory(out, replace=overwrite) as building:
        for path in directory.iterdir():
            if path.name in ("bundle.json", "sampling.yaml", "clusters.npy"):
                shutil.copyfile(path, building / path.name)
        shutil.copytree(directory / "image_tokenizer", building / "image_tokenizer")
        tokenizer.save(building / "text.model")
        for name, checkpoint in sorted(models.items(), key=lambda item: item[1].trunk is not None):
            _extend_model(checkpoint, building / name, old, tokenizer)
        config = BundleConfig()
        if (building / "bundle.json").is_file():
            values = read_json(building / "bundle.json", dict[str, Any])
            config = from_dict(BundleConfig, values, str(directory / "bundle.json"))
        hashes = config.sha256 | {"text.model": sha256_file(building / "text.model")}
        write_json(building / "bundle.json", to_dict(replace(config, sha256=hashes)))


def _extend_model(checkpoint: Checkpoint, out: Path, old: TextTokenizer, tokenizer: TextTokenizer) -> None:
    config = stored_config(checkpoint)
    shared = set() if checkpoint.trunk is None else checkpoint.trunk.infos.keys()
    trunk = None if checkpoint.trunk is None else out.parent / checkpoint.trunk.directory.name
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names if name not in shared}
    if EMBEDDINGS in tensors:
        tensors[EMBEDDINGS] = extend_embeddings(tensors[EMBEDDINGS], old, tokenizer)
    kind = "model" if "model" in checkpoint.config else "superres"
    settings = {**checkpoint.config, kind: to_dict(replace(config, vocabulary=tokenizer.vocabulary))}
    records = replace(TokenizerRecords.of_export(checkpoint.extra), text=tokenizer.sha256)
    extra = {**checkpoint.extra, **records.to_extra()}
    save_checkpoint(out, tensors, settings, extra=extra, trunk=trunk)


def extend_embeddings(table: Tensor, old: TextTokenizer, tokenizer: TextTokenizer) -> Tensor:
    """Shapes: table (ids, h) -> (ids of `tokenizer`, h). Rows without an old piece are replaced."""
    new_rows = []
    for id in range(old.vocabulary.size, tokenizer.vocabulary.size):
        spelled = old.encode(tokenizer.piece(id).replace("▁", " "))
        new_rows.append(table[spelled].float().mean(0))
    rows = [table[: old.vocabulary.size], *(row[None].to(table.dtype) for row in new_rows)]
    return torch.cat(rows)
