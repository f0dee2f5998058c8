"""Tables of text: quoting, headers, separators, rows of another length, in the dialects of pandas and spreadsheets."""

import csv
import io

import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.readers import ReadOptions, open_captions
from cogvideo.data.readers.textfile import MAX_LINE_BYTES

HARD = [
    'a disc, called "moon", moves',
    '"quoted"',
    "two\nlines",
    "tab\tinside",
    "semi; colon",
    "plain",
    "it's 5\" wide",
]


def captions_of(path, text, **options):
    path.write_text(text, encoding="utf-8", newline="")
    return open_captions(path, **options)


@pytest.mark.parametrize(("name", "delimiter"), [("c.csv", ","), ("c.csv", ";"), ("c.csv", "\t"), ("c.tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_what_a_csv_writer_writes_is_read(tmp_path, name, delimiter, end, quoting):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows(
        [("file_name", "views", "text"), *((f"{i}.mp4", i, text.replace("\n", end)) for i, text in enumerate(HARD))]
    )
    captions = captions_of(tmp_path / name, out.getvalue())
    assert [caption.text for caption in captions] == [" ".join(text.split()) for text in HARD]
    assert [caption.extra["views"] for caption in captions] == [str(i) for i in range(len(HARD))]
    assert [caption.video for caption in captions.select([5, 2, 0])] == ["5.mp4", "2.mp4", "0.mp4"]


def test_backslashes_before_quotes(tmp_path):
    captions = captions_of(tmp_path / "c.csv", 'video,caption\na.mp4,"called \\"moon\\", it moves"\nb.mp4,"x"\n')
    assert [caption.text for caption in captions] == ['called "moon", it moves', "x"]


def test_a_tsv_without_quoting_keeps_its_quotes(tmp_path):
    text = 'a.mp4\t"hello" she said\nb.mp4\t"never closed\nc.mp4\t5" wide\nd.mp4\tends with "\n'
    found = [caption.text for caption in captions_of(tmp_path / "c.tsv", text)]
    assert found == ['"hello" she said', '"never closed', '5" wide', 'ends with "']


def test_an_open_quote_costs_one_row_only(tmp_path):
    captions = captions_of(tmp_path / "c.csv", 'video,caption\na.mp4,"open\nb.mp4,"fine"\nc.mp4,x\n', skip_bad=True)
    assert [caption.video for caption in captions] == ["b.mp4", "c.mp4"]
    assert captions.bad_reasons() == [
        "c.csv line 2: a quote is opened and not closed; close it, or double a quote that is text"
    ]


@pytest.mark.parametrize(("name", "delimiter"), [("c.csv", ","), ("c.tsv", "\t"), ("c.csv", ";")])
def test_without_a_header(tmp_path, name, delimiter):
    assert list(captions_of(tmp_path / name, f"a.mp4{delimiter}x\nb.mp4{delimiter}y\n")) == [
        Caption("a.mp4", "x"),
        Caption("b.mp4", "y"),
    ]


def test_a_header_that_names_no_column_is_an_error_with_the_option(tmp_path):
    text = "name,description\na.mp4,x\n"
    with pytest.raises(
        ValueError, match="line 1: no video column among: name, description; name it with --video-column"
    ):
        captions_of(tmp_path / "c.csv", text)
    with pytest.raises(ValueError, match="line 1: no column 'descr'; the columns are: name, description"):
        captions_of(tmp_path / "c.csv", text, options=ReadOptions("name", "descr"))
    found = list(captions_of(tmp_path / "c.csv", text, options=ReadOptions("name", "description")))
    assert found == [Caption("a.mp4", "x")]


@pytest.mark.parametrize("header", ["video,text,title", "video,caption,caption", "path,file_name,caption"])
def test_two_candidates(tmp_path, header):
    with pytest.raises(ValueError, match=r"line 1: .* could each be the (video|caption); choose with --"):
        captions_of(tmp_path / "c.csv", f"{header}\na.mp4,b.mp4,x\n")


def test_columns_of_pandas_and_lines_of_excel(tmp_path):
    (caption,) = captions_of(tmp_path / "c.csv", ",video,caption,fps,fps\n0,a.mp4,x,8,9\n")
    assert caption == Caption("a.mp4", "x", extra={"column 1": "0", "fps": "8", "fps 5": "9"})
    assert list(captions_of(tmp_path / "c.csv", "sep=;\nvideo;caption\na.mp4;x, y\n")) == [Caption("a.mp4", "x, y")]
    assert list(captions_of(tmp_path / "c.csv", "\n\nvideo,caption,,\na.mp4,x,,\n,,,\n")) == [
        Caption("a.mp4", "x", extra={"column 3": "", "column 4": ""})
    ]


def test_rows_of_another_length(tmp_path):
    text = "video,caption,fps\na.mp4,x\nb.mp4,one, two,8\nc.mp4,x,8,,\nd.mp4\n"
    captions = captions_of(tmp_path / "c.csv", text, skip_bad=True)
    assert [caption.video for caption in captions] == ["c.mp4"]
    assert [record.place for record in captions.bad] == ["line 2", "line 3", "line 5"]
    assert captions.bad[0].reason == "expected 3 fields (video, caption, fps), got 2"
    assert captions.bad[1].reason.endswith("got 4; put quotes around a caption that holds the separator")


def test_a_field_of_any_size_costs_its_row_only(tmp_path):
    size = 3 * MAX_LINE_BYTES
    text = f'video,caption\na.mp4,{"x" * size}\nb.mp4,fine\nc.mp4,"{"x, " * size}"\nd.mp4,fine\n'
    captions = captions_of(tmp_path / "c.csv", text, skip_bad=True)
    assert [caption.video for caption in captions] == ["b.mp4", "d.mp4"]
    assert all(f"longer than {MAX_LINE_BYTES} bytes" in record.reason for record in captions.bad)


def test_line_numbers_count_lines_within_quotes(tmp_path):
    captions = captions_of(tmp_path / "c.csv", 'video,caption\na.mp4,"x\n\ny"\nb.mp4,\n', skip_bad=True)
    assert captions.bad_reasons() == ["c.csv line 5: the caption is empty; describe the video in a few words"]


def test_byte_order_marks_anywhere(tmp_path):
    expected = [Caption("a.mp4", "x"), Caption("b.mp4", "y, z")]
    for text in (
        '\ufeffvideo,caption\na.mp4,x\n\ufeff"b.mp4","y, z"\n',
        '\ufeff\ufeffvideo,caption\na.mp4,x\nb.mp4,"y, z"\n',
        'caption,\ufeffvideo\nx,a.mp4\n"y, z",b.mp4\n',
    ):
        captions = captions_of(tmp_path / "c.csv", text)
        assert list(captions) == expected and captions.select([1, 0]) == expected[::-1]


def test_a_quote_after_a_space_opens_a_field(tmp_path):
    text = 'video, caption, note\na.mp4, "x, y", "z"\nb.mp4,"he said, ""no""", 1\n c.mp4,plain, 2\n'
    assert list(captions_of(tmp_path / "c.csv", text)) == [
        Caption("a.mp4", "x, y", extra={"note": "z"}),
        Caption("b.mp4", 'he said, "no"', extra={"note": "1"}),
        Caption(" c.mp4", "plain", extra={"note": " 2"}),
    ]


@pytest.mark.parametrize("name", ["c.csv", "c.tsv"])
def test_separators_after_the_last_named_column_may_be_missing(tmp_path, name):
    text = "video,caption,,\na.mp4,x\nb.mp4,y,\nc.mp4\n"
    captions = captions_of(tmp_path / name, text if name == "c.csv" else text.replace(",", "\t"), skip_bad=True)
    assert [(caption.video, caption.text) for caption in captions] == [("a.mp4", "x"), ("b.mp4", "y")]
    assert captions.bad[0].reason.endswith("got 1")


def test_rows_of_separators_before_the_header(tmp_path):
    assert list(captions_of(tmp_path / "c.csv", ',,\n"",\n\nvideo,caption\na.mp4,x\n')) == [Caption("a.mp4", "x")]


def test_very_many_columns_are_refused_and_many_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"c\.csv line 1: 500002 columns; expected at most 16384"):
        captions_of(tmp_path / "c.csv", "path,caption" + "," * 500_000 + "\n")
    rows = "".join(["a.mp4,x" + ",y" * 10_000 + "\n", "a.mp4\n" * 3])
    captions = captions_of(tmp_path / "c.csv", "path,caption" + ",name" * 10_000 + "\n" + rows, skip_bad=True)
    assert len(captions) == 1 and len(captions.select([0])[0].extra) == 10_000
    assert len(captions.bad) == 3 and max(len(record.reason) for record in captions.bad) < 300


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
def test_blank_lines_are_skipped_and_counted(tmp_path, name):
    header = "" if name == "c.jsonl" else "path,caption\n".replace(",", "\t" if name == "c.tsv" else ",")
    good = {"c.csv": "a.mp4,x\n", "c.tsv": "a.mp4\tx\n", "c.jsonl": '{"video": "a.mp4", "caption": "x"}\n'}[name]
    blank = "\n \n\r\n\t\n" * 5000
    captions = captions_of(tmp_path / name, blank + header + blank + good + blank + "{oops\n" + good, skip_bad=True)
    assert [caption.text for caption in captions] == ["x", "x"] and captions.select([1])[0].video == "a.mp4"
    assert captions.bad[0].place == f"line {60_002 + (header != '')}"
