"""The limit on open files is raised as far as it goes, and a hint names more than it allows."""

import resource

import pytest

from merge_cli.system.descriptors import allow_open_files, open_files_hint


@pytest.mark.parametrize(
    ("soft", "hard", "after", "hint"),
    [
        (1024, 4096, 4096, "ulimit -n 4096, then"),
        (1024, 1024, 1024, "ulimit -n 4096 (of root"),
        (64, 1 << 30, 1 << 20, "ulimit -n 1024, then"),
        (256, resource.RLIM_INFINITY, 1 << 20, "ulimit -n 1024, then"),
    ],
)
def test_the_limit_goes_up_and_the_hint_names_more(
    soft: int, hard: int, after: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert hint in open_files_hint()
    allow_open_files()
    assert limits[-1] == (after, hard)


def test_a_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, both: tuple[int, int]) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 128))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    allow_open_files()
