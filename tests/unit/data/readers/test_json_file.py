"""One JSON value: every form, and what is none."""

import json
import tracemalloc

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers import ReadOptions, open_captions

EXPECTED = [Caption("a.mp4", "x"), Caption("b.mp4", "y")]


def captions_of(tmp_path, value, **options):
    (tmp_path / "c.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return open_captions(tmp_path / "c.json", **options)


@pytest.mark.parametrize(
    "value",
    [
        [{"path": "a.mp4", "cap": "x"}, {"path": "b.mp4", "cap": "y"}],
        {"a.mp4": "x", "b.mp4": "y"},
        {"a.mp4": {"caption": "x"}, "b.mp4": {"text": ["y"]}},
        {"video": {"0": "a.mp4", "1": "b.mp4"}, "caption": {"0": "x", "1": "y"}},
        {"file_name": ["a.mp4", "b.mp4"], "text": ["x", "y"]},
    ],
)
def test_forms(tmp_path, value):
    captions = captions_of(tmp_path, value)
    assert list(captions) == EXPECTED and captions.select([1]) == EXPECTED[1:]


LINES = '{"video": "a.mp4", "caption": "x"}\n{"video": "b.mp4", "caption": "y"}\n'


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("text", [LINES, f"[{LINES.replace('}' + chr(10) + '{', '},' + chr(10) + '{')}]"])
def test_the_content_says_whether_a_file_holds_lines(tmp_path, suffix, encoding, text):
    file = tmp_path / f"c{suffix}"
    file.write_text(text, encoding=encoding)
    captions = open_captions(file)
    assert list(captions) == EXPECTED and captions.select([1]) == EXPECTED[1:]


def test_a_bad_line_of_a_json_file_that_holds_lines(tmp_path):
    captions = captions_of(tmp_path, LINES + "{oops\n", skip_bad=True)
    assert list(captions) == EXPECTED and captions.bad[0].place == "line 3"
    (tmp_path / "c.jsonl").write_text("{oops\n" + LINES)
    captions = open_captions(tmp_path / "c.jsonl", skip_bad=True)
    assert list(captions) == EXPECTED and captions.bad[0].place == "line 1"


def test_joined_surrogates_are_one_character(tmp_path):
    assert captions_of(tmp_path, '{"a.mp4": "\\ud83d\\ude00"}').select([0])[0].text == "\U0001f600"


def test_a_path_that_occurs_twice_has_two_captions(tmp_path):
    found = list(captions_of(tmp_path, '{"a.mp4": "x", "b.mp4": "z", "a.mp4": ["y"]}'))
    assert found == [Caption("a.mp4", "x"), Caption("a.mp4", "y"), Caption("b.mp4", "z")]


def test_names_that_are_given(tmp_path):
    options = ReadOptions("id", "label")
    assert list(captions_of(tmp_path, [{"id": "a.mp4", "label": "x"}], options=options)) == EXPECTED[:1]
    assert list(captions_of(tmp_path, {"a.mp4": "x"}, options=options)) == EXPECTED[:1]


def test_bad_entries_are_skipped(tmp_path):
    captions = captions_of(tmp_path, [{"video": "a.mp4", "caption": "x"}, 3, {"video": "b.mp4"}, None], skip_bad=True)
    assert list(captions) == EXPECTED[:1] and [record.place for record in captions.bad] == [
        "entry 2",
        "entry 3",
        "entry 4",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "expected a list of objects"),
        ('[{"video": "a.mp4",\n "caption" "x"}]', "line 2: not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "holds no captions"),
        ('{"video": ["a.mp4"], "caption": ["x", "y"]}', "columns of different lengths"),
        ('[{"video": "a.mp4", "text": "x", "title": "y"}]', "choose with --caption-column"),
    ],
)
def test_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        captions_of(tmp_path, text, skip_bad=True)
    assert "\n" not in str(caught.value)


def test_columns_of_very_many_values_are_refused_before_they_are_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideo.data.readers.json_file.MAX_COLUMN_VALUES", 40)
    columns = {"video": [f"{i}.mp4" for i in range(21)], "caption": ["x"] * 21}
    with pytest.raises(ValueError, match=r"c\.json has 41 commas and 3 brackets; expected JSON with at most 40 values"):
        captions_of(tmp_path, columns)
    assert len(captions_of(tmp_path, {name: column[:20] for name, column in columns.items()})) == 20
    monkeypatch.setattr("cogvideo.data.readers.json_file.MAX_COLUMNS_BYTES", 100)
    with pytest.raises(
        ValueError, match=r"c\.json: an entry of .*, or columns of more than 0 MiB; write it as \.jsonl"
    ):
        captions_of(tmp_path, columns)


@pytest.fixture
def small_chunks(monkeypatch):
    """Entries are cut at every place."""
    monkeypatch.setattr("cogvideo.data.readers.json_file.CHUNK", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("indent", [None, 1])
def test_entries_are_found_again_by_their_offsets(tmp_path, encoding, indent):
    records = [{"video": f"{i}.mp4", "caption": "数字 \U0001f600"[: i % 5 + 1], "n": 10**i} for i in range(9)]
    expected = [Caption(r["video"], r["caption"].strip(), extra={"n": r["n"]}) for r in records]
    options = ReadOptions(encoding=encoding if encoding == "gb18030" else None)
    by_path = {record["video"]: {"caption": record["caption"], "n": record["n"]} for record in records}
    for value in (records, by_path):
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        (tmp_path / "c.json").write_text(text, encoding=encoding)
        captions = open_captions(tmp_path / "c.json", options)
        assert list(captions) == expected
        assert captions.select([8, 0, 1, 7]) == [expected[i] for i in (8, 0, 1, 7)]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "text", ['[{"video": "a.mp4",\n "caption": "x"},\n {"video": 3 4}]', '{"a": "x",\n\n "b" "x"}']
)
def test_the_line_of_damage_is_named(tmp_path, text):
    line = 1 + text.count("\n")
    with pytest.raises(ValueError, match=rf"c\.json line {line}: not JSON \(Expecting"):
        captions_of(tmp_path, text)


@pytest.mark.parametrize(
    "text", ['[{"a": 1}', "[1,]", "[1] 2", '{"a.mp4": "x", 3: "y"}', '{"a.mp4": "x"', "[1 2]", "[,]"]
)
def test_json_that_is_cut_short_or_goes_on_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"c\.json line 1: not JSON"):
        captions_of(tmp_path, text, skip_bad=True)


def test_memory_does_not_grow_with_the_entries(tmp_path):
    entry = '{"video": "a.mp4", "caption": "' + "x" * 4000 + '"}'
    (tmp_path / "c.json").write_text("[" + ",".join([entry] * 5000) + "]")
    tracemalloc.start()
    try:
        captions = open_captions(tmp_path / "c.json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(captions) == 5000 and peak < 8 << 20


def test_a_long_entry_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideo.data.readers.json_file.CHUNK", 16)
    monkeypatch.setattr("cogvideo.data.readers.json_file.MAX_ENTRY", 100)
    with pytest.raises(ValueError, match=r"c\.json entry 2: longer than 100 characters"):
        captions_of(tmp_path, [{"video": "a.mp4", "caption": "x"}, {"video": "a.mp4", "caption": "x" * 1000}])
    with pytest.raises(ValueError, match=r"c\.json: an entry of more than 100 characters"):
        captions_of(tmp_path, {"a.mp4": "x" * 1000})
    assert len(captions_of(tmp_path, {"video": ["a.mp4"] * 50, "caption": ["x"] * 50})) == 50, "columns may be"


@pytest.mark.parametrize("wrong", ["'x'", '"x" y', "tru", "01", '"\\x"', '"\t"', '"x",}', "{3: 4}"])
def test_a_syntax_error_before_much_text_is_no_long_entry(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr("cogvideo.data.readers.json_file.MAX_ENTRY", 100)
    good = ['{"video": "a.mp4", "caption": "x"}'] * 200
    for chunk in (1, 7, 1 << 16):
        monkeypatch.setattr("cogvideo.data.readers.json_file.CHUNK", chunk)
        with pytest.raises(ValueError, match=r"c\.json line 3: not JSON \("):
            captions_of(tmp_path, "[\n" + ",\n".join([good[0], f'{{"caption": {wrong}}}', *good]) + "]")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "value", ["-Infinity", "1.5e+300", "false", '"\\ud83d\\ude00"', '"' + "x" * 50 + '"', "[ ]", "{ }"]
)
def test_values_are_read_wherever_a_chunk_ends(tmp_path, value):
    text = (
        f'[{{"video": "a.mp4", "caption": "x", "n": {value}}}, {{"video": "b.mp4", "n": [{value}, 1], "caption": "y"}}]'
    )
    assert [caption.text for caption in captions_of(tmp_path, text)] == ["x", "y"]


def test_many_entries_that_are_no_records_are_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideo.data.readers.json_file.MAX_BAD", 3)
    good, others = {"video": "a.mp4", "caption": "x"}, [3, {"video": "a.mp4"}, {"caption": "x"}]
    assert len(captions_of(tmp_path, [good, *others], skip_bad=True).bad) == 3
    with pytest.raises(ValueError, match=r"c\.json has more than 3 entries without a video and a caption"):
        captions_of(tmp_path, [good, *others, []], skip_bad=True)


def test_a_file_that_changes_is_one_line(tmp_path):
    captions = captions_of(tmp_path, [{"video": "a.mp4", "caption": "x"}] * 3)
    (tmp_path / "c.json").write_text("]" * 200)
    with pytest.raises(ValueError, match=r"c\.json entry 2: the file has changed"):
        captions.select([1])
