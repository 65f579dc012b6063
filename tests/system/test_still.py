"""Waiting for files to be still: real files, whose times are set, and a clock that only sleeping
moves.
"""

import os
from pathlib import Path

import pytest

from merge_cli.errors import UsageError
from merge_cli.request.spec import RunConfig
from merge_cli.system import still

NOW = 1_800_000_000.0


class Clock:
    """A clock; `at` are things that happen at a time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.at: list[tuple[float, Path]] = []

    def monotonic(self) -> float:
        return self.seconds

    def time(self) -> float:
        return NOW + self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        for each in [each for each in self.at if each[0] <= self.seconds]:
            self.at.remove(each)
            each[1].write_bytes(each[1].read_bytes() + b"x")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(still, "time", made)
    monkeypatch.setattr(still, "_changed_ns", lambda status: status.st_mtime_ns)  # the other time cannot be set
    return made


def write(path: Path, age_s: float) -> Path:
    path.write_bytes(b"x")
    os.utime(path, (NOW - age_s, NOW - age_s))
    return path


@pytest.mark.parametrize(("age_s", "waited"), [(1000, 0), (60, 0), (45, 15), (0, 60), (-500, 60)])
def test_the_wait_is_what_is_left_of_the_time_since_the_newest_change(
    age_s: float, waited: float, tmp_path: Path, clock: Clock
) -> None:
    write(tmp_path / "old", 5000)
    write(tmp_path / "new", age_s)
    assert still.wait_until_still([str(tmp_path)], 60) == pytest.approx(waited)
    assert still.wait_until_still([str(tmp_path / "new")], 0) == 0


def test_a_change_begins_the_wait_anew(tmp_path: Path, clock: Clock) -> None:
    path = write(tmp_path / "file", 0)
    clock.at = [(20, path), (50, path)]
    assert still.wait_until_still([str(tmp_path)], 60) == pytest.approx(50 + 60)


def test_a_wait_is_a_number_of_seconds() -> None:
    assert RunConfig(settle="1.5").settle == 1.5  # type: ignore[arg-type]  # as the command line has it
    for value in ("soon", "-1", "nan", "1e9"):
        with pytest.raises(UsageError, match="--settle cannot be"):
            RunConfig(settle=value)  # type: ignore[arg-type]
