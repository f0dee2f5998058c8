"""How much memory planning counts with: the machine's, or what a container leaves of it."""

import os
from pathlib import Path

import pytest

from cogvideo.planning.machines import usable_memory

WHOLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
NO_LIMIT = "9223372036854771712"
"""As version 1 writes it."""


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {f"{V2}/memory.max": "1048576\n"}, 1048576),
        ("0::/a/b\n", {f"{V2}/a/memory.max": "4096", f"{V2}/a/b/memory.max": "max\n"}, 4096),
        ("0::/outside\n", {f"{V2}/memory.max": "8192"}, 8192),
        ("5:cpu:/\n4:hugetlb,memory:/a\n0::/\n", {f"{V1}/a/memory.limit_in_bytes": "12288"}, 12288),
        ("4:memory:/a\n", {f"{V1}/a/memory.limit_in_bytes": NO_LIMIT}, WHOLE),
        ("0::/\n", {f"{V2}/memory.max": "max\n"}, WHOLE),
        ("0::/\n", {f"{V2}/memory.max": "a lot"}, WHOLE),
        ("nothing known", {}, WHOLE),
        (None, {}, WHOLE),
    ],
)
def test_a_container_limits_memory(groups: str | None, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in files.items() if groups is None else {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_memory(tmp_path) == expected
