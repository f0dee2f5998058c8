"""requirements.lock, which the workflow on GitHub installs: the packages that pyproject.toml asks for, with hashes."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]


def test_the_lock_has_what_the_project_needs() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(
        r"^([a-z0-9._-]+)(?:\[[a-z0-9,_-]+\])?==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)", text, re.M
    )
    locked = {name: version for name, version, _ in entries}
    assert len(locked) == len(re.findall("^[a-z]", text, re.M)), "each has hashes"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *extras["dev"])]
    included = [name for requirement in wanted if requirement.name == "cogvideo" for name in requirement.extras]
    assert "hub" in included
    wanted += [Requirement(line) for name in included for line in extras[name]]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name not in ("torch", "cogvideo"):
            assert requirement.specifier.contains(locked[name]), f"{name}: run `make lock`"
