"""A report is one file: all text escaped, pictures inlined, nothing fetched."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cogvideo.evaluation.html_report import HtmlReport

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_report_is_self_contained(tmp_path: Path, picture: Path):
    report = HtmlReport("Clips & tokens")
    report.section("<b>One</b>")
    report.text("红色的数字3向左快速移动 <script>alert(1)</script>")
    report.preformatted("$ cogvideo sample 'a < b'")
    report.table([["measure", "value"], ["digit", ">= 80 %"]])
    report.pictures([(picture, 'a "red" square'), (picture, "again")], width=160)
    report.write(tmp_path / "deep" / "report.html")

    page = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    names = [tag for tag, _ in reader.tags]
    assert names.count("img") == 2 and names.count("td") == 2 and "script" not in names and "b" not in names
    assert "红色的数字3向左快速移动 <script>alert(1)</script>" in reader.words
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert base64.b64decode(sources[0].removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert "http://" not in page and "https://" not in page and "url(" not in page


def test_files_that_are_not_pictures_are_refused(tmp_path: Path):
    (tmp_path / "a.html").write_text("<p>")
    with pytest.raises(ValueError, match="not a picture"):
        HtmlReport("x").pictures([(tmp_path / "a.html", "")])
    with pytest.raises(OSError):
        HtmlReport("x").pictures([(tmp_path / "missing.png", "")])
