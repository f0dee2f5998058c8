"""What the docs say about the code's files and functions is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cogvideo"
WALKS = (ROOT / "docs" / "concepts" / "code.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`[^|]+`) \| `([\w/]+\.py)` \|", WALKS, flags=re.MULTILINE)


def test_there_are_functions_to_check() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize(("names", "file"), ROWS)
def test_functions_of_the_walks_are_where_the_docs_say(names: str, file: str) -> None:
    source = (PACKAGE / file).read_text(encoding="utf-8")
    for name in re.findall(r"`([\w.]+)`", names):
        for part in name.split("."):
            assert re.search(rf"^ *(?:def|class) {part}\b", source, flags=re.MULTILINE), f"{file} has no {part}"


def test_the_reading_order_names_ten_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"^\d+\. `(cogvideo/[\w/]+\.py)`", readme, flags=re.MULTILINE)
    assert len(files) == 10
    assert all((ROOT / file).is_file() for file in files)


def test_pages_named_in_the_code_exist() -> None:
    files = [path for folder in ("cogvideo", "scripts", "configs") for path in (ROOT / folder).rglob("*.[py][ya]*")]
    pages = {page for path in files for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))}
    assert pages, "some files refer to the docs"
    assert [page for page in sorted(pages) if not (ROOT / page).is_file()] == []
