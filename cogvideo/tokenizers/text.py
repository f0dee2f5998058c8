"""Text to joint-vocabulary ids and back: a sentencepiece unigram model whose pieces follow the image tokens.

Joint id = piece id + num_image_tokens. Line breaks are the piece `<n>`. In models trained here the special pieces are
of sentencepiece's CONTROL type: they have ids, but no text that a user types is encoded to them. Not here: how a prompt
is put together (`sequence/prompt.py`).
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from cogvideo.files import atomic_write
from cogvideo.sequence.layout import Vocabulary
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.text import split_lines
from cogvideo.tokenizers import icetk

PAD, NEWLINE, START_OF_IMAGE = "<pad>", "<n>", "<start_of_image>"
MAX_MODEL_BYTES = 64 << 20  # a model of 150,000 pieces takes about 4 MB
NUM_BYTE_PIECES = 256
MAX_PIECES = 1_000_000
PIECE_TAG = b"\n"
"""The protobuf tag of a piece: two of these bytes per piece, and a few by chance. They are counted before parsing,
since two bytes of a file can become a piece that takes 70 in memory."""
NORMAL = ModelProto.SentencePiece.NORMAL
SPELLED_LENGTH = 4
"""A word that takes this many pieces or more is spelled out rather than known."""
MAX_SENTENCE_BYTES = 4192
"""sentencepiece's default, above which it leaves out a line of text without saying so."""
IMAGE_TOKENS_NOTE = "num_image_tokens={}"
"""The number of image tokens before the pieces, stored in a field of the model file that sentencepiece ignores."""


class TextTokenizer:
    """A sentencepiece model and the number of image tokens before it; use `open_text_tokenizer`, `load` or `train`."""

    def __init__(self, model: bytes, num_image_tokens: int, *, vocabulary_size: int | None = None) -> None:
        """Raises: ValueError if `model` is not a sentencepiece model with the special pieces."""
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
            self._pieces.decode(self._pieces.encode("a 1"))  # some damage shows only in use
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            reason = (str(error).splitlines() or ["unreadable"])[0]
            raise ValueError(f"not a complete sentencepiece model ({reason})") from None
        self.num_image_tokens = num_image_tokens
        pad, newline, start_of_image = (self._special_id(piece) for piece in (PAD, NEWLINE, START_OF_IMAGE))
        size = num_image_tokens + self._pieces.get_piece_size()
        self.vocabulary = Vocabulary(
            size=size if vocabulary_size is None else vocabulary_size,
            num_image_tokens=num_image_tokens,
            pad=pad,
            newline=newline,
            start_of_image=start_of_image,
        )

    def encode(self, text: str) -> list[int]:
        """Joint ids; each line is encoded separately, with `<n>` between lines."""
        ids: list[int] = []
        for number, line in enumerate(split_lines(text)):
            if number:
                ids.append(self.vocabulary.newline)
            ids += [piece + self.num_image_tokens for piece in self._pieces.encode(line)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of joint ids; special pieces other than `<n>` are left out. Raises: ValueError for other ids."""
        for id in ids:
            if not 0 <= id - self.num_image_tokens < self._pieces.get_piece_size():
                raise ValueError(
                    f"id {id} is not a text id; text ids are {self.num_image_tokens}.."
                    f"{self.num_image_tokens + self._pieces.get_piece_size() - 1}"
                )
        text = ""
        for is_break, run in groupby(ids, key=lambda id: id == self.vocabulary.newline):
            pieces = [id - self.num_image_tokens for id in run]
            text += "\n" * len(pieces) if is_break else self._pieces.decode(pieces)
        return text

    def piece(self, id: int) -> str:
        """The piece with this joint id, for display."""
        return self._pieces.id_to_piece(id - self.num_image_tokens)

    def has_pieces_for(self, text: str) -> bool:
        """Whether a text can be encoded without unknown pieces or bytes."""
        ids = [id for line in split_lines(text) for id in self._pieces.encode(line)]
        return not any(self._pieces.is_byte(id) or self._pieces.is_unknown(id) for id in ids)

    @cached_property
    def sha256(self) -> str:
        """The hex SHA-256 of the file that `save` writes."""
        return hashlib.sha256(self._file_content()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write a model file for `load`, including the special pieces and the number of image tokens."""
        with atomic_write(path) as temporary:
            temporary.write_bytes(self._file_content())

    def _file_content(self) -> bytes:
        proto = parse_model(self._pieces.serialized_model_proto())
        proto.trainer_spec.model_prefix = IMAGE_TOKENS_NOTE.format(self.num_image_tokens)
        content: bytes = proto.SerializeToString(deterministic=True)
        return content

    @classmethod
    def load(cls, path: Path | str, num_image_tokens: int | None = None) -> "TextTokenizer":
        """Read a model file; `num_image_tokens` is only needed if the file does not give it (trained elsewhere).

        Raises: OSError if it cannot be opened; ValueError, naming the file, if it is not such a model.
        """
        model = read_model(path)
        try:
            if num_image_tokens is None:
                num_image_tokens = _noted_image_tokens(parse_model(model))
            return cls(model, num_image_tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def train(
        cls, captions: Iterable[str], path: Path | str, num_pieces: int, num_image_tokens: int
    ) -> "TextTokenizer":
        """Learn about `num_pieces` pieces (fewer if the captions do not have them), write the model, and return it.

        The parts of prompts that are not captions (clip lengths, suffixes) are added to the captions. Bytes are pieces
        too, so any text can be encoded. The same captions in the same order give the same model.
        Raises: ValueError for no captions, too many pieces, or too few pieces for the captions' characters.
        """
        if num_pieces > MAX_PIECES:
            raise ValueError(f"text tokenizer: num_pieces={num_pieces}; expected at most {MAX_PIECES}")
        tokenizer = cls(_train_model(_caption_lines(captions), num_pieces), num_image_tokens)
        tokenizer.save(path)
        return tokenizer

    def extended(self, captions: Iterable[str], max_pieces: int) -> "TextTokenizer":
        """This tokenizer with up to `max_pieces` more pieces, the most frequent first; the old ones keep their ids.

        New pieces are those of the captions that this tokenizer spells as bytes, or in SPELLED_LENGTH pieces or more.
        Other text is encoded as before. The same captions in the same order give the same pieces.
        Raises: ValueError for no captions.
        """
        lines = _caption_lines(captions)
        old = parse_model(self._pieces.serialized_model_proto())
        known = {entry.piece for entry in old.pieces}
        learned = parse_model(_train_model(lines, min(MAX_PIECES, _least_pieces(lines) + max_pieces)))
        candidates = [entry for entry in learned.pieces if entry.type == NORMAL and entry.piece not in known]
        candidates.sort(key=lambda entry: -entry.score)  # log probabilities
        for entry in [entry for entry in candidates if self._spells_out(entry.piece)][:max_pieces]:
            old.pieces.add(piece=entry.piece, score=entry.score, type=NORMAL)
        return TextTokenizer(old.SerializeToString(deterministic=True), self.num_image_tokens)

    def _spells_out(self, piece: str) -> bool:
        """Whether a piece of another model is unknown here, or encoded as bytes or as SPELLED_LENGTH pieces or more."""
        ids = self._pieces.encode(piece.replace("▁", " "))
        known = not any(self._pieces.is_byte(id) or self._pieces.is_unknown(id) for id in ids)
        return not known or len(ids) >= SPELLED_LENGTH

    def _special_id(self, piece: str) -> int:
        """Joint id of a special piece, looked up by name."""
        id = self._pieces.piece_to_id(piece)
        if not 0 <= id < self._pieces.get_piece_size() or self._pieces.id_to_piece(id) != piece:
            raise ValueError(f"the sentencepiece model has no piece {piece}; it was not made by cogvideo")
        return id + self.num_image_tokens


def open_text_tokenizer(path: Path | str) -> TextTokenizer:
    """Open our model file, or the published one: `ice_text.model`, its folder, or the word `icetk`.

    Raises: OSError, or ValueError in one line, if it is missing or damaged.
    """
    folder = icetk.icetk_folder(Path(path), icetk.TEXT_FILE)
    return TextTokenizer.load(path) if folder is None else load_icetk_text(folder)


def load_icetk_text(
    folder: Path | str = icetk.DEFAULT_FOLDER,
    *,
    num_image_tokens: int = icetk.NUM_IMAGE_TOKENS,
    vocabulary_size: int | None = icetk.VOCABULARY_SIZE,
) -> TextTokenizer:
    """The published text tokenizer with its special pieces; with `vocabulary_size` None the pieces are counted.

    Raises: FileNotFoundError that says what to put where; ValueError for a file that is not such a model.
    """
    path = icetk.find_icetk_file(folder, icetk.TEXT_FILE)
    try:
        model = icetk.add_special_pieces(parse_model(read_model(path)))
        return TextTokenizer(model, num_image_tokens, vocabulary_size=vocabulary_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_model(path: Path | str) -> bytes:
    """The bytes of a model file. Raises: OSError; ValueError if it is larger than MAX_MODEL_BYTES."""
    with open(path, "rb") as file:
        model = file.read(MAX_MODEL_BYTES + 1)
    if len(model) > MAX_MODEL_BYTES:
        raise ValueError(f"{path}: larger than {MAX_MODEL_BYTES >> 20} MiB, expected a sentencepiece model")
    return model


def parse_model(model: bytes) -> ModelProto:
    """Raises: ValueError if the bytes are not a sentencepiece model."""
    if model.count(PIECE_TAG) > 3 * MAX_PIECES:
        raise ValueError(f"has too many pieces to be read; expected at most {MAX_PIECES}")
    proto = ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        raise ValueError("not a complete sentencepiece model (its bytes do not parse)") from None
    if not proto.pieces:
        raise ValueError("not a complete sentencepiece model (it has no pieces)")
    if not all(isinstance(text, str) for text in (proto.trainer_spec.model_prefix, *(p.piece for p in proto.pieces))):
        raise ValueError("not a complete sentencepiece model (it holds text that is not UTF-8)")  # protobuf gives bytes
    return proto


def _noted_image_tokens(proto: ModelProto) -> int:
    note = re.fullmatch(IMAGE_TOKENS_NOTE.format(r"(\d{1,9})"), proto.trainer_spec.model_prefix)
    if note is None:
        raise ValueError("does not give the number of image tokens before its pieces; it was not made by cogvideo")
    return int(note[1])


def _caption_lines(captions: Iterable[str]) -> list[str]:
    """The lines of text that a model of these captions is trained on. Raises: ValueError for no captions."""
    lines = [line for caption in captions for line in split_lines(caption) if line.strip()]
    if not lines:
        raise ValueError("text tokenizer: no captions to learn from; the captions are empty")
    return [*lines, *_prompt_lines(), *_word_lines(lines)]


def _least_pieces(lines: list[str]) -> int:
    """The fewest pieces that a model of these lines can have: bytes, characters, four special pieces and the space."""
    return NUM_BYTE_PIECES + len(set("".join(lines))) + 5


def _train_model(lines: list[str], num_pieces: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence for line in lines for sentence in _sentences(line)),
            model_writer=model,
            model_type="unigram",
            vocab_size=num_pieces,
            hard_vocab_limit=False,  # a small set of captions may not yield that many pieces
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,  # "3" is one piece in every language and number
            normalization_rule_name="nfkc",
            bos_id=-1,
            eos_id=-1,
            pad_id=1,
            pad_piece=PAD,
            control_symbols=[NEWLINE, START_OF_IMAGE],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        least = _least_pieces(lines)
        if "required_chars" not in str(error) and num_pieces >= least:
            raise
        raise ValueError(
            f"text tokenizer: num_pieces={num_pieces} does not fit these captions; give {least} or more"
        ) from None
    return model.getvalue()


def _sentences(line: str) -> Iterator[str]:
    """A line in parts of at most MAX_SENTENCE_BYTES, split at white space, and inside a word only if it is longer.

    Pieces do not span words, so the same pieces are learned from the parts as from the line.
    """
    if len(line.encode()) <= MAX_SENTENCE_BYTES:
        yield line
        return
    sentence: list[str] = []
    size = 0
    for word in line.split():
        fits = len(word.encode()) <= MAX_SENTENCE_BYTES
        step = len(word) if fits else MAX_SENTENCE_BYTES // 4  # a character takes up to 4 bytes
        for part in (word[first : first + step] for first in range(0, len(word), step)):
            added = len(part.encode()) + 1
            if size + added > MAX_SENTENCE_BYTES + 1:  # no space after the last word
                yield " ".join(sentence)
                sentence, size = [], 0
            sentence.append(part)
            size += added
    yield " ".join(sentence)


def _prompt_lines() -> list[str]:
    prompt = PromptFormat()
    seconds = [f"{tenths / 10}{prompt.seconds_unit}" for tenths in range(1, 161)]
    return [*seconds, *[prompt.unconditional, prompt.image_suffix, prompt.video_suffix] * 40]


def _word_lines(lines: list[str]) -> list[str]:
    """Every word once with a comma and once with a full stop.

    Unigram training starts from substrings that occur in at least two distinct words, so a word that only occurs on its
    own would be spelled letter by letter, however frequent it is.
    """
    words = {word for line in lines for word in line.split() if word.isascii() and word.isalpha()}
    return [word + mark for word in sorted(words) for mark in ",."]
