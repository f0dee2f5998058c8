"""scripts/bench_data.py reuses a data set for the number of rows that it has, and for no other."""

from pathlib import Path

import pytest

from tests.helpers.scripts import load_script

bench_data = load_script("bench_data")


def test_a_data_set_is_reused_for_its_own_rows_alone(tmp_path: Path) -> None:
    bench_data.make_dataset(tmp_path, 5)
    written = (tmp_path / "captions.jsonl").stat().st_mtime_ns
    bench_data.make_dataset(tmp_path, 5)
    assert (tmp_path / "captions.jsonl").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"holds a data set of 5 rows, got --rows 6; give another --work"):
        bench_data.make_dataset(tmp_path, 6)
