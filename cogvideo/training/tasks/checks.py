"""What tasks check before the first step: that data, tokenizers, initial weights and lengths belong together.

What is certainly wrong is an error; what probably is, or costs quality, is a warning. Both name the key to change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.data.dataset import ClipDataset, InMemoryClips, PairDataset
from cogvideo.data.statistics import FEW_CODES_ADVICE, MAX_CAPTIONS, CaptionLengths, CodeUse, spread
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.logs import get_logger
from cogvideo.tokenizers.records import TokenizerRecords, are_different, hash_tokenizer
from cogvideo.tokenizers.text import TextTokenizer, open_text_tokenizer
from cogvideo.training.config import DataConfig, TrainConfig, errors_name_key

log = get_logger(__name__)

MAX_CUT = 0.5
"""Largest share of the captions that may be longer than the model's text."""
MAX_SPELLED = 0.1
"""A vocabulary that falls back to bytes in more than this share of the captions was made for other texts."""


def open_vocabulary(settings: DataConfig) -> TextTokenizer:
    """The text tokenizer of a run. Raises: ValueError that names the key."""
    with errors_name_key("data.text_tokenizer"):
        return open_text_tokenizer(settings.text_tokenizer or BUNDLED_WEIGHTS / "text.model")


def check_tokenizers(
    config: TrainConfig,
    text_tokenizer: TextTokenizer,
    data: ClipDataset | InMemoryClips | PairDataset,
    validation: ClipDataset | InMemoryClips | PairDataset | None,
) -> TokenizerRecords:
    """Compare the image tokenizers of the data, the validation data, the config and init.checkpoint, and the text
    tokenizers of the run and init.checkpoint. Returns the records for the export.

    Raises: ValueError if any two certainly differ.
    """
    settings, init = config.data, config.init
    decoder = _decoder_record("data.image_tokenizer", settings.image_tokenizer)
    of_data = _image_records(data)
    records = replace(of_data, text=text_tokenizer.sha256, image=decoder if settings.path is None else of_data.image)
    if validation is not None and (kind := _image_records(validation).differing(records, both_sizes=True)):
        raise ValueError(
            f"data.validation={_names(settings.validation)} was made by another {kind} than "
            f"data.path={_names(settings.path)}; prepare both with the same one"
        )
    if are_different(records.image, decoder):
        made_by = f"did not make the tokens of data.path={_names(settings.path)}"
        if settings.image_tokenizer is not None:
            raise ValueError(
                f"data.image_tokenizer={settings.image_tokenizer} {made_by}; prepare them again with it, or set "
                "data.image_tokenizer to the one that they were prepared with"
            )
        log.warning(
            "data.image_tokenizer is null, and the bundled image tokenizer %s: there will be no sample sheets; set it "
            "to the folder that `cogvideo prepare --tokenizer` was given",
            made_by,
        )
    elif isinstance(data, PairDataset):
        path = settings.high_res_tokenizer
        decoder = decoder if path is None else _decoder_record("data.high_res_tokenizer", path)
        if are_different(records.high_res or records.image, decoder):
            raise ValueError(
                f"data.high_res_tokenizer={'null' if path is None else path} did not make the tokens of the large "
                f"frames of data.path={_names(settings.path)}; set it to the folder that they were prepared with"
            )
    if init.checkpoint is not None:
        with errors_name_key("init.checkpoint"):
            checkpoint = load_checkpoint(init.checkpoint, verify=False)
        trained = TokenizerRecords.of_export(checkpoint.extra)
        if (kind := trained.differing(records, both_sizes="superres" in checkpoint.config)) is not None:
            key = "data.text_tokenizer" if kind == "text tokenizer" else f"data.path={_names(settings.path)}"
            raise ValueError(
                f"init.checkpoint={init.checkpoint} was trained with another {kind} than {key}; use the same one, or "
                "start from another checkpoint"
            )
    return records


def check_same_tokenizers(config: TrainConfig, records: TokenizerRecords, saved: Mapping[str, Any]) -> None:
    """Compare the tokenizers of a run with those in a checkpoint's state.json. Raises: ValueError if they differ."""
    kind = TokenizerRecords.of_export(saved.get("inputs", {})).differing(records, both_sizes=config.task == "superres")
    if kind is not None:
        data = config.data
        made_by = (
            f"data.image_tokenizer={data.image_tokenizer}" if data.path is None else f"data.path={_names(data.path)}"
        )
        key = f"data.text_tokenizer={data.text_tokenizer}" if kind == "text tokenizer" else made_by
        raise ValueError(
            f"{config.run_dir} was trained with another {kind} than {key}; resume it with the one that it started "
            "with, or use another run_dir"
        )


def check_codes(data: ClipDataset | InMemoryClips | PairDataset) -> None:
    """Log how many of the image tokenizer's codes the data uses; warn if they are few."""
    if not data.num_tokens:
        return
    use = CodeUse.count(data.sample_tokens(), data.num_tokens)
    if use.is_low:
        log.warning("%s: %s", use, FEW_CODES_ADVICE)
    else:
        log.info("%s", use)


def check_captions(
    settings: DataConfig,
    tokenizer: TextTokenizer,
    texts: Sequence[tuple[float, str]],
    read: Callable[[float, str], list[int]],
    text_len: int,
    advice: str,
    *,
    sampling_refuses: bool = True,
) -> None:
    """Warn if captions will be cut, or if the vocabulary does not fit them.

    `texts`: lengths in seconds and captions; `read`: returns the text ids that the model reads for both. `advice`: what
    to set to make room for {} tokens. `sampling_refuses`: whether sampling refuses prompts that training cuts.
    Raises: ValueError if most captions would be cut and sampling refuses such prompts, or if the vocabulary is the
    bundled one by default and does not fit.
    """
    counts = CaptionLengths.count(texts, read, tokenizer.has_pieces_for)
    if counts.spelled_share > MAX_SPELLED:
        problem = f"it has no pieces for some characters of {counts.spelled_share:.0%} of the captions"
        remedy = "make one from them with `cogvideo vocabulary` and set data.text_tokenizer to it"
        if settings.text_tokenizer is None:
            bundled = BUNDLED_WEIGHTS / "text.model"
            raise ValueError(
                f"data.text_tokenizer is null, which means the vocabulary of the bundled moving digits, and {problem}; "
                f"{remedy} (or to {bundled}, to keep this one)"
            )
        log.warning("data.text_tokenizer=%s: %s; %s", settings.text_tokenizer, problem, remedy)
    cut, total = counts.num_above(text_len), len(counts.lengths)
    if not cut:
        return
    share = f"the captions of {cut:,} of {total:,} clips ({cut / total:.0%})"
    found = f"{share} take more than {text_len} text tokens, up to {counts.longest}"
    advice = advice.format(counts.longest)
    if not sampling_refuses:
        log.warning("%s, and are cut, as in sampling; %s", found, advice)
    elif cut > MAX_CUT * total:
        raise ValueError(f"{found}, and training would cut them; {advice}")
    else:
        log.warning("%s, and are cut, while sampling refuses such prompts; %s", found, advice)


def sampled_texts(data: ClipDataset | InMemoryClips | PairDataset) -> list[tuple[float, str]]:
    """Lengths in seconds (0 for single frames) and captions of all rows, or of evenly spaced ones if there are many."""
    rows = spread(len(data), MAX_CAPTIONS)
    if isinstance(data, PairDataset):
        return [(0.0, caption) for caption in data.texts(rows)]
    return data.texts(rows)


def _image_records(data: ClipDataset | InMemoryClips | PairDataset) -> TokenizerRecords:
    return TokenizerRecords(
        data.tokenizer_record, high_res=data.high_res_record if isinstance(data, PairDataset) else None
    )


def _decoder_record(key: str, path: Path | None) -> dict[str, Any]:
    """The record of the image tokenizer at `path`, which the config sets as `key`; None: the bundled one."""
    with errors_name_key(key):
        return hash_tokenizer(path or BUNDLED_WEIGHTS / "image_tokenizer")


def _names(folders: list[Path] | None) -> str:
    return ",".join(map(str, folders or []))
