"""TextTokenizer: ids, special pieces, round trips, damaged model files, and opening by path."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.sequence.prompt import PromptFormat
from cogvideo.tokenizers import text as text_module
from cogvideo.tokenizers.icetk import TEXT_FILE
from cogvideo.tokenizers.text import TextTokenizer, open_text_tokenizer

COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色"}
CAPTIONS = [
    caption
    for english, chinese in COLOURS.items()
    for digit in range(10)
    for caption in (f"the {english} digit {digit} moves left quickly", f"{chinese}的数字{digit}向左快速移动")
]
IMAGE_TOKENS = 100


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.model"
    TextTokenizer.train(CAPTIONS, path, num_pieces=400, num_image_tokens=IMAGE_TOKENS)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_file):
    return TextTokenizer.load(model_file)


def test_ids_are_text_ids_and_specials_differ(tokenizer):
    vocabulary = tokenizer.vocabulary
    assert vocabulary.num_image_tokens == IMAGE_TOKENS
    assert len({vocabulary.pad, vocabulary.newline, vocabulary.start_of_image}) == 3
    assert [tokenizer.piece(id) for id in (vocabulary.pad, vocabulary.newline, vocabulary.start_of_image)] == [
        "<pad>",
        "<n>",
        "<start_of_image>",
    ]
    for caption in CAPTIONS:
        assert all(IMAGE_TOKENS <= id < vocabulary.size for id in tokenizer.encode(caption))


def test_words_and_lengths_take_few_pieces(tokenizer):
    assert len(tokenizer.encode("the red digit 3 moves left quickly")) <= 9  # a digit and its space are two pieces
    assert len(tokenizer.encode("红色的数字3向左快速移动")) <= 12
    prompt = PromptFormat()
    ids = prompt.clip_text(tokenizer.encode, tokenizer.vocabulary.newline, 4.0, CAPTIONS[0], 32, suffix=" 视频")
    assert tokenizer.decode(ids) == "4.0秒\n" + CAPTIONS[0] + " 视频"


def test_a_digit_is_the_same_piece_in_both_languages(tokenizer):
    english, chinese = (set(tokenizer.encode(text)) for text in ("digit 7", "数字7"))
    assert len({id for id in english & chinese if tokenizer.piece(id) == "7"}) == 1


@pytest.mark.parametrize(
    "text", ["", "红色 red 🎉👍🏽 mixed 混合", "two\nlines", "\n\n", "末尾\n", "<pad> <n> <start_of_image>"]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_typed_special_pieces_are_only_text(tokenizer):
    vocabulary = tokenizer.vocabulary
    ids = tokenizer.encode("a<pad>b<n>c<start_of_image>")
    assert not {vocabulary.pad, vocabulary.newline, vocabulary.start_of_image} & set(ids)


def test_line_breaks_of_every_kind_are_the_newline_piece(tokenizer):
    for text in ("a\nb", "a\r\nb", "a\rb"):
        assert tokenizer.encode(text).count(tokenizer.vocabulary.newline) == 1
    assert tokenizer.encode("a\n\nb").count(tokenizer.vocabulary.newline) == 2


@given(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=30))
def test_any_text_encodes_and_comes_back_normalised(tokenizer, text):
    expected = unicodedata.normalize("NFKC", text)
    if "▁" not in expected and " " not in expected:  # sentencepiece's own mark for a space; spaces fold to one
        decoded = tokenizer.decode(tokenizer.encode(text))
        assert unicodedata.normalize("NFKC", decoded) == expected


def test_decode_refuses_image_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"id 5 is not a text id; text ids are 100\.\."):
        tokenizer.decode([5])
    with pytest.raises(ValueError, match="is not a text id"):
        tokenizer.decode([tokenizer.vocabulary.size])


def test_training_repeats_bitwise(model_file, tmp_path):
    TextTokenizer.train(CAPTIONS, tmp_path / "again.model", num_pieces=400, num_image_tokens=IMAGE_TOKENS)
    assert (tmp_path / "again.model").read_bytes() == model_file.read_bytes()


@pytest.mark.parametrize("size", [4192, 4193, 20_000])
def test_long_captions_are_learned_too(tmp_path, size):
    caption = "зебра зебры " * (size // 24)  # words in ASCII are added to the captions one by one
    caption += "x" * (size - len(caption.encode()))
    assert len(caption.encode()) == size
    tokenizer = TextTokenizer.train([*CAPTIONS, caption], tmp_path / "text.model", 400, IMAGE_TOKENS)
    assert len(tokenizer.encode("зебра зебры")) <= 4
    base = TextTokenizer.train(CAPTIONS, tmp_path / "base.model", 400, IMAGE_TOKENS)
    assert len(base.encode("зебра зебры")) > 8
    assert len(base.extended([*CAPTIONS, caption], 50).encode("зебра зебры")) <= 4


@pytest.mark.parametrize(
    "line", ["x " * 32_768, "字" * 65_536, "a" * 4192, "b" * 4191 + " cc", "🐘" * 2000 + " é" * 3000, "d" * 4193]
)
def test_long_lines_are_split_at_white_space_without_losing_text(line):
    parts = list(text_module._sentences(line))
    assert all(0 < len(part.encode()) <= 4192 for part in parts)
    assert "".join("".join(parts).split()) == "".join(line.split())
    words = {word for word in line.split() if len(word.encode()) <= 4192}
    assert words <= {word for part in parts for word in part.split()}


def test_training_errors(tmp_path):
    with pytest.raises(ValueError, match="no captions"):
        TextTokenizer.train(["", "  \n"], tmp_path / "m", num_pieces=400, num_image_tokens=8)
    with pytest.raises(ValueError, match=r"num_pieces=50 does not fit these captions; give \d+ or more$"):
        TextTokenizer.train(CAPTIONS, tmp_path / "m", num_pieces=50, num_image_tokens=8)
    with pytest.raises(ValueError, match="num_pieces=99999999999; expected at most 1000000"):
        TextTokenizer.train(CAPTIONS, tmp_path / "m", num_pieces=99999999999, num_image_tokens=8)
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_models(model_file, tmp_path, monkeypatch):
    complete = model_file.read_bytes()
    bad = tmp_path / "bad.model"
    for content in (b"", b"not a model", complete[: len(complete) // 2], complete[:-3]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model: ") as error:
            TextTokenizer.load(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        TextTokenizer.load(tmp_path / "none.model")
    monkeypatch.setattr(text_module, "MAX_MODEL_BYTES", 1 << 10)
    with pytest.raises(ValueError, match="larger than"):
        TextTokenizer.load(model_file)


def test_very_many_pieces_are_refused_before_they_are_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module.ModelProto, "ParseFromString", None, raising=False)
    (tmp_path / "x.model").write_bytes(b"\n\x00" * 3_000_001)
    with pytest.raises(ValueError, match=r"x\.model: has too many pieces to be read; expected at most 1000000"):
        TextTokenizer.load(tmp_path / "x.model")


def test_a_model_trained_elsewhere_needs_the_number_of_image_tokens(model_file, tmp_path):
    proto = text_module.parse_model(model_file.read_bytes())
    proto.trainer_spec.model_prefix = "somebody-elses"
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="the number of image tokens"):
        TextTokenizer.load(foreign)
    assert TextTokenizer.load(foreign, num_image_tokens=8).vocabulary.num_image_tokens == 8
    others = [piece for piece in proto.pieces if piece.piece != "<start_of_image>"]
    del proto.pieces[:]
    proto.pieces.extend(others)
    foreign.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="no piece <start_of_image>"):
        TextTokenizer.load(foreign, num_image_tokens=8)


def test_our_model_is_opened_by_its_path(model_file):
    tokenizer = open_text_tokenizer(model_file)
    assert tokenizer.vocabulary.num_image_tokens == IMAGE_TOKENS
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[0])) == CAPTIONS[0]


@pytest.fixture
def icetk_folder(model_file, tmp_path):
    (tmp_path / TEXT_FILE).write_bytes(model_file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", [TEXT_FILE, "."])
def test_the_published_model_has_the_published_vocabulary(icetk_folder, name):
    tokenizer = open_text_tokenizer(icetk_folder / name)
    assert tokenizer.vocabulary.num_image_tokens == 20000
    assert tokenizer.vocabulary.size == 150010


def test_a_saved_copy_of_the_published_model_opens_as_ours(icetk_folder):
    published = open_text_tokenizer(icetk_folder)
    published.save(icetk_folder / "copy.model")
    copy = open_text_tokenizer(icetk_folder / "copy.model")
    assert copy.encode(CAPTIONS[1]) == published.encode(CAPTIONS[1])
    for name in ("num_image_tokens", "pad", "newline", "start_of_image"):
        assert getattr(copy.vocabulary, name) == getattr(published.vocabulary, name)


def test_a_model_with_text_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "text.model"
    TextTokenizer.train(["the red digit 3"], path, 310, 16)
    path.write_bytes(path.read_bytes().replace(b"num_image_tokens=16", b"num_image_tokens=\xff6"))
    with pytest.raises(
        ValueError, match=r"text\.model: not a complete sentencepiece model \(it holds text that is not"
    ):
        TextTokenizer.load(path)
