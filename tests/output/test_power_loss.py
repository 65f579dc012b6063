"""Power loss in a strict model: only what fsync has guaranteed survives. scripts/faults --attack
power tries every moment.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from faults.attacks import power
from faults.attacks.world import World
from faults.disk import Change, Disk, Survivors
from faults.runs import FaultRuns


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    if not shutil.which("gcc"):
        pytest.skip("changes are recorded by a library that gcc compiles")
    with tempfile.TemporaryDirectory(prefix="pmerge-test-") as folder, ExitStack() as stack:
        yield World(Path(folder) / "world", stack.enter_context(FaultRuns()), stack, thorough=False)


@pytest.mark.parametrize("job", power.JOBS, ids=lambda job: job.name)
def test_promise_3_after_power_loss_a_result_is_absent_or_complete_and_after_exit_0_it_is_there(
    world: World, job: power.Job
) -> None:
    """After every fifth renaming and at the end; half of the states are continued by the same
    commands.
    """
    tries = list(power.crashes(world, job, every=5, share=0.5))
    assert [f"{what}: {broken}" for what, broken in tries if broken] == []
    assert len(tries) >= 8


# --- the model itself


def change(kind: str, path: Path, other: Path | None = None, first: int = 0, data: bytes = b"") -> Change:
    return Change(kind, path, other or Path(), first, 0, data)


def after_crash(disk: Disk, folder: Path, *, names: bool, data: bool) -> dict[str, bytes]:
    disk.crash(Survivors(lambda *_: names, lambda _: data)).write(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_not_synced_may_be_lost(tmp_path: Path) -> None:
    top, copy = tmp_path / "top", tmp_path / "copy"
    top.mkdir()
    (top / "old").write_bytes(b"old")
    disk = Disk(top)
    for each in (change("create", top / "new.partial"), change("write", top / "new.partial", data=b"new")):
        disk.apply(each)
    disk.apply(change("rename", top / "new.partial", top / "new"))
    assert after_crash(disk, copy, names=False, data=True) == {"old": b"old"}
    assert after_crash(disk, copy, names=True, data=False) == {"old": b"old", "new": b""}
    disk.apply(change("fsync", top / "new"))
    assert after_crash(disk, copy, names=True, data=False) == {"old": b"old", "new": b"new"}
    assert after_crash(disk, copy, names=False, data=False) == {"old": b"old"}
    disk.apply(change("fsync", top))
    assert after_crash(disk, copy, names=False, data=False) == {"old": b"old", "new": b"new"}


def test_a_swap_is_undone_as_a_whole(tmp_path: Path) -> None:
    top, copy = tmp_path / "top", tmp_path / "copy"
    for name in ("one", "two"):
        (top / name).mkdir(parents=True)
        (top / name / "file").write_text(name)
    disk = Disk(top)
    disk.apply(change("swap", top / "one", top / "two"))
    assert after_crash(disk, copy, names=False, data=False) == {"one/file": b"one", "two/file": b"two"}
    assert after_crash(disk, copy, names=True, data=False) == {"one/file": b"two", "two/file": b"one"}


def test_a_name_that_survives_takes_the_earlier_ones_of_its_folder_along(tmp_path: Path) -> None:
    top, copy = tmp_path / "top", tmp_path / "copy"
    top.mkdir()
    disk = Disk(top)
    for name in ("a", "b", "c"):
        disk.apply(change("create", top / name))
    disk.crash(Survivors(lambda k, _: k == 1, lambda _: False)).write(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["a", "b"]
