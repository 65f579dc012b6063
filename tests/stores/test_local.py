"""Files of this machine: what makes a file another one, across opens, runs and mounts, and what
does not.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_checkpoint

from merge_cli import Rank, average, finalize, plan_average, run_average, verify
from merge_cli.engine.reader import InputFiles, check_unchanged
from merge_cli.errors import ChangedError, StoreError
from merge_cli.formats.opening import open_checkpoint
from merge_cli.formats.weight_file import WeightFile
from merge_cli.stores.local import LocalSource
from merge_cli.stores.store import read_bytes


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    return [write_checkpoint(tmp_path / "run" / f"step_{i}", {"w": torch.full((64, 64), float(i))}, shards=1) for i in (1, 2)]


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Gives the files of the run other inodes, as FUSE mounts do: `mount("once")` others than so
    far, "always" at each look.
    """
    below, offsets = str((tmp_path / "run").resolve()), itertools.count(1)
    offset: Callable[[], int] = lambda: 0  # noqa: E731

    def wrapped(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def stat(path: Any, *more: Any, **options: Any) -> os.stat_result:
            status = real(path, *more, **options)
            where = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else os.path.realpath(path)
            if not str(where).startswith(below):
                return status
            reduced: Any = status.__reduce__()
            values, names = reduced[1]
            return os.stat_result((values[0], values[1] + offset(), *values[2:]), names)

        return stat

    def change(when: str) -> None:
        nonlocal offset
        number = next(offsets) << 20
        offset = (lambda: number) if when == "once" else lambda: next(offsets) << 20

    monkeypatch.setattr(os, "stat", wrapped(os.stat))
    monkeypatch.setattr(os, "fstat", wrapped(os.fstat))
    yield change


@pytest.mark.parametrize("when", ["once", "always"])
def test_inodes_that_change_do_not_stop_a_run(when: str, run: list[Path], mount: Callable[[str], None], tmp_path: Path) -> None:
    before = run[0].stat().st_ino
    mount(when)
    assert run[0].stat().st_ino != before
    average(run, tmp_path / "out")
    mount(when)
    found = verify(tmp_path / "out", against_inputs=True)
    assert found.ok and found.recomputed == 1


@pytest.mark.parametrize("when", ["once", "always"])
def test_a_run_goes_on_after_a_remount(
    when: str, run: list[Path], mount: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(when)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("merge_cli.output.publish.write_metadata_files", stop)
        average(run, tmp_path / "out")
    mount(when)
    assert average(run, tmp_path / "out").reused == 1


def test_ranks_on_other_mounts_agree(run: list[Path], mount: Callable[[str], None], tmp_path: Path) -> None:
    for rank in (0, 1):
        mount("once")
        run_average(plan_average(run, tmp_path / "out", rank=Rank(rank, 2)))
    mount("once")
    assert finalize(tmp_path / "out") == tmp_path / "out" and verify(tmp_path / "out").ok


# -- files that change
# --------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def file(run: list[Path]) -> WeightFile:
    return open_checkpoint(run[0]).files[0]


def put_back(path: Path, time: os.stat_result) -> None:
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))


def replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    put_back(path.with_suffix(".new"), path.stat())
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_that_loses_its_name_while_it_is_open_is_noticed(how: str, file: WeightFile) -> None:
    path = Path(file.path)
    with InputFiles() as inputs:
        inputs.read_into(file, 0, memoryview(bytearray(100)))
        replace(path) if how == "replaced" else path.unlink()
        inputs.read_into(file, 0, memoryview(bytearray(100)))  # of the file that is open, which is whole
    with pytest.raises(ChangedError, match="was replaced or removed during the run"):
        check_unchanged(file)


def test_an_equal_file_that_is_put_in_its_place_meanwhile_is_the_same(file: WeightFile) -> None:
    replace(Path(file.path))
    check_unchanged(file)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path: os.truncate(path, 1000), "found     1000 bytes"),
        (lambda path: os.utime(path, (1, 1)), "mtime 1000000000 ns"),
        (Path.unlink, "disappeared during the run"),
    ],
)
def test_a_file_that_changed_is_not_opened_again(change: Callable[[Path], None], text: str, file: WeightFile) -> None:
    change(Path(file.path))
    with pytest.raises(ChangedError, match=text), InputFiles() as inputs:
        inputs.read_into(file, 0, memoryview(bytearray(100)))


def test_a_header_rewritten_with_its_time_set_back_is_noticed(file: WeightFile) -> None:
    path, time = Path(file.path), Path(file.path).stat()
    with path.open("r+b") as raw:
        raw.seek(file.header.data_start - 1)
        raw.write(b"\t")
    put_back(path, time)
    with pytest.raises(ChangedError, match="the header of"):
        check_unchanged(file)


def test_no_more_files_stay_open_than_allowed(tmp_path: Path) -> None:
    files = open_checkpoint(write_checkpoint(tmp_path / "c", {f"w{i}": torch.ones(10) for i in range(9)}, shards=9)).files
    before = descriptors()
    with InputFiles(max_open=3, direct=True) as inputs:
        for file in files * 2:
            inputs.read_into(file, 8, memoryview(bytearray(10)))
            assert descriptors() <= before + 3
    assert descriptors() == before


def test_an_error_of_the_storage_names_file_byte_and_tensor(file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StoreError) as error, InputFiles() as inputs:
        inputs.read_into(file, file.header.data_start, memoryview(bytearray(100)))
    assert f"{file.path} at byte {file.header.data_start}: Input/output error" in str(error.value)
    assert "tensor    `w`" in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Exception, match="not a regular file"):
        LocalSource(str(tmp_path / "pipe"))


def test_a_source_that_is_closed_holds_no_descriptor(file: WeightFile) -> None:
    before = descriptors()
    read_bytes(file.source, 0, 10)
    assert descriptors() == before + 1
    file.source.close()
    assert descriptors() == before
