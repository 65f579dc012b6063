"""The record of `pmerge watch`: nothing outside its folder is named by it, whoever wrote it."""

import json
from pathlib import Path

import pytest

from merge_cli.errors import InputError
from merge_cli.trajectory.watched import RECORD, Watched, WatchedMerges, read_record


@pytest.mark.parametrize("name", ["../victim", "..", ".", "", "a/b", "/victim"])
def test_a_merge_outside_the_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    merges = WatchedMerges(tmp_path)
    merges.note("sma-at1", Watched("sma", 1, "removing", True))
    assert [*read_record(tmp_path).merges] == ["sma-at1"]
    record = json.loads((tmp_path / RECORD).read_bytes())
    record["merges"] = {name: record["merges"]["sma-at1"]}
    (tmp_path / RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match="outside its folder"):
        read_record(tmp_path)
