"""The documentation names things that exist: functions of the call chains, and pages that the package refers to."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALL = re.compile(r"^(?P<file>[a-z_/]+)\.py +(?P<name>[A-Za-z_.]+)", re.MULTILINE)
CALLS = re.compile(r"<!-- calls -->\n```text\n(.*?)```", re.DOTALL)
PAGE = re.compile(r"docs/[\w/-]+\.md")


def test_call_chains_name_functions_that_exist() -> None:
    found = 0
    for page in (ROOT / "docs/concepts").glob("*.md"):
        for block in CALLS.findall(page.read_text(encoding="utf-8")):
            for call in CALL.finditer(block):
                target: object = importlib.import_module("cogvideo." + call["file"].replace("/", "."))
                for part in call["name"].split("."):
                    assert hasattr(target, part), f"{page.name}: {call.group()}"
                    target = getattr(target, part)
                found += 1
    assert found > 30


def test_pages_that_files_refer_to_exist() -> None:
    files = [path for folder in ("cogvideo", "scripts", "configs", "tests") for path in (ROOT / folder).rglob("*")]
    named = {
        (page, path.name)
        for path in files
        if path.suffix in {".py", ".yaml", ".cpp", ".sh", ".md"}
        for page in PAGE.findall(path.read_text(encoding="utf-8"))
    }
    assert {page for page, _ in named} >= {"docs/guides/sample.md", "docs/log.md"}
    assert [entry for entry in sorted(named) if not (ROOT / entry[0]).is_file()] == []
