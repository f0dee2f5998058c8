"""icetk's files: a sentencepiece model of the published size, built by editing a small one, and VQ-VAE weights."""

import io
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from cogvideo.sequence.layout import Vocabulary
from cogvideo.tokenizers.icetk import DEFAULT_FOLDER, IMAGE_FILE, TEXT_FILE, add_special_pieces
from cogvideo.tokenizers.image import image_tokenizer_files, load_icetk_image, open_image_tokenizer
from cogvideo.tokenizers.text import load_icetk_text, open_text_tokenizer, parse_model
from cogvideo.tokenizers.vqvae import VQVAE, VQVAEConfig
from cogvideo.torch_archive import MAX_PICKLE_BYTES

TEXTS = ["a lion is drinking water", "一只狮子正在喝水", "a 狮子 drinks 水", "🦁🎉 ok 好", "line one\n第二行\n", "\n\n"]
TINY = VQVAEConfig(
    channels=8, channel_multipliers=(1, 1, 2), encoder_num_res_blocks=1, z_channels=8, embedding_dim=8, num_codes=16,
    norm_groups=4,
)  # fmt: skip


def write_text_model(folder, num_pieces):
    """The published layout, with the special pieces at their ids."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "lion water drinking", "狮子 喝水"] * 3),
        model_writer=model, vocab_size=330, hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    proto = ModelProto()
    proto.ParseFromString(model.getvalue())
    kind = ModelProto.SentencePiece.Type
    # <unk> 0, <s> 1, </s> 2 as trained; then <pad> 3, <n> 4, a space 5
    learned = [piece for piece in proto.pieces if piece.piece not in ("<unk>", "<s>", "</s>", "▁")]
    space = next(piece.score for piece in proto.pieces if piece.piece == "▁")
    del proto.pieces[3:]
    for text, score in (("<pad>", 0.0), ("<n>", 0.0), ("▁", space)):
        proto.pieces.add(piece=text, score=score, type=kind.NORMAL)
    proto.pieces.extend(learned)
    for number in range(num_pieces - len(proto.pieces)):
        proto.pieces.add(piece=f"filler{number}", score=-50.0, type=kind.NORMAL)
    (folder / TEXT_FILE).write_bytes(proto.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a text model of the published size: text ids 20,000 to 149,999, so 130,000 pieces."""
    return write_text_model(tmp_path_factory.mktemp("icetk"), 130_000)


@pytest.fixture(scope="module")
def text(published):
    return load_icetk_text(published)


def test_published_ids(text):
    assert text.vocabulary == Vocabulary()
    named = {
        20000: "<unk>", 20002: "</s>", 20003: "<pad>", 20004: "<n>", 20005: "▁",
        150000: "<start_of_image>", 150001: "<start_of_english>", 150002: "<start_of_chinese>",
    }  # fmt: skip
    assert {id: text.piece(id) for id in named} == named


@pytest.mark.parametrize("words", TEXTS)
def test_round_trips(text, words):
    ids = text.encode(words)
    assert text.decode(ids) == words
    assert ids.count(20004) == words.count("\n")
    assert all(20000 <= id < 150000 for id in ids)


def test_150_000_pieces(tmp_path):
    """Another size: the special pieces are appended to the pieces there are, and looked up by name."""
    text = load_icetk_text(write_text_model(tmp_path, 150_000), vocabulary_size=None)
    assert text.vocabulary == Vocabulary(170_003, 20_000, pad=20_003, newline=20_004, start_of_image=170_000)
    assert text.piece(170_001) == "<start_of_english>"
    for words in TEXTS:
        ids = text.encode(words)
        assert text.decode(ids) == words and ids.count(20_004) == words.count("\n")
        assert all(20_000 <= id < 170_000 for id in ids)
    last = text.piece(169_999)
    assert last.startswith("filler") and text.encode(last)[-1] == 169_999, "the last piece of the file is found"


def test_ids_are_those_of_the_icetk_package():
    """Compare icetk's tokenizer with ours on its files. It conflicts with many current packages, so it is optional."""
    package = pytest.importorskip("icetk", reason="the icetk package is not installed", exc_type=ImportError)
    text = load_icetk_text()
    for words in TEXTS[:4]:
        assert text.encode(words) == package.icetk.encode(words)


def test_typed_special_pieces_are_only_text(text):
    typed = "show <start_of_image> now"
    assert 150000 not in text.encode(typed) and text.decode(text.encode(typed)) == typed


def test_pieces_are_added_once(text, published, tmp_path):
    once = add_special_pieces(parse_model((published / TEXT_FILE).read_bytes()))
    assert add_special_pieces(parse_model(once)) == once


def test_missing_files_say_what_to_put_where(tmp_path):
    for load, name in ((load_icetk_text, TEXT_FILE), (load_icetk_image, IMAGE_FILE)):
        with pytest.raises(FileNotFoundError) as error:
            load(tmp_path)
        assert str(tmp_path / name) in str(error.value) and "~/.icetk_models" in str(error.value)
        assert "\n" not in str(error.value)


def test_the_word_icetk_means_the_package_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for open_tokenizer, name in ((open_text_tokenizer, TEXT_FILE), (open_image_tokenizer, IMAGE_FILE)):
        with pytest.raises(FileNotFoundError, match=name):
            open_tokenizer("icetk")
    assert image_tokenizer_files("icetk") == [DEFAULT_FOLDER.expanduser() / IMAGE_FILE]


def test_text_model_cut_short(published, tmp_path):
    (tmp_path / TEXT_FILE).write_bytes((published / TEXT_FILE).read_bytes()[:100_001])
    with pytest.raises(ValueError, match=r"ice_text\.model: not a complete sentencepiece model"):
        load_icetk_text(tmp_path)


def save_weights(folder, config=TINY, key="module"):
    torch.manual_seed(0)
    model = VQVAE(config).eval()
    torch.save({key: model.state_dict()}, folder / IMAGE_FILE)
    return model


def test_image_weights_load_at_every_rate(tmp_path):
    model = save_weights(tmp_path)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for level, rate in enumerate((4, 8, 16)):
        tokenizer = load_icetk_image(tmp_path, rate, TINY)
        assert tokenizer.compress_rate == rate
        ids = tokenizer.encode(image)
        assert torch.equal(ids, model.encode(tokenizer.normalise(image), level).flatten(1))
        assert tokenizer.decode(ids).shape == image.shape


def test_image_weights_of_another_kind(tmp_path):
    save_weights(tmp_path, key="state")
    with pytest.raises(ValueError, match="no dict of tensors under 'module'"):
        load_icetk_image(tmp_path, 8, TINY)
    save_weights(tmp_path, config=replace(TINY, num_codes=17))
    with pytest.raises(ValueError, match=r"quantize\.\w+.* expected floats"):
        load_icetk_image(tmp_path, 8, TINY)
    complete = (tmp_path / IMAGE_FILE).read_bytes()
    odd = io.BytesIO()
    with zipfile.ZipFile(odd, "w") as archive:  # a list as a key: the unpickler raises TypeError
        for name, data in (("data.pkl", b"\x80\x02}]K\x01s."), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"x/{name}", data)
    for content in (b"", b"nonsense", complete[: len(complete) // 2], odd.getvalue()):
        (tmp_path / IMAGE_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=r"ice_image\.pt is (cut short|refused|damaged)") as error:
            load_icetk_image(tmp_path, 8, TINY)
        assert "\n" not in str(error.value)


class Planted:
    """Would write a file when unpickled by a plain loader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_pickle_that_would_run_code_does_not(tmp_path, save):
    planted = tmp_path / "planted"
    save({"module": Planted(planted)}, tmp_path / IMAGE_FILE)
    with pytest.raises(ValueError, match=r"refused.*io\.open|not in the torch\.save format") as error:
        load_icetk_image(tmp_path, 8, TINY)
    assert not planted.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(("repeat", "compression"), [(1 << 26, zipfile.ZIP_DEFLATED), (MAX_PICKLE_BYTES + 1, 0)])
def test_weights_that_would_take_all_memory_are_refused_unread(tmp_path, repeat, compression):
    """Packed zeros, and a pickle that is a list per byte."""
    with zipfile.ZipFile(tmp_path / IMAGE_FILE, "w", compression) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02(" + b"]" * repeat + b"l.")
    with pytest.raises(ValueError, match="it is not a checkpoint"):
        load_icetk_image(tmp_path, 8, TINY)


def test_weights_that_claim_more_than_the_file_has_are_refused(tmp_path):
    """A number that is shown as a thousand."""
    torch.save({"module": {"a": torch.zeros(1).expand(1000, 1000)}}, tmp_path / IMAGE_FILE)
    with pytest.raises(ValueError, match="is not contiguous"):
        load_icetk_image(tmp_path, 8, TINY)
