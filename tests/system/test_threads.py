"""Work in threads: every item once, in order, whatever the system allows."""

import _thread
import threading

import pytest

from merge_cli.system.threads import map_in_threads


def no_thread(*_: object) -> int:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("allowed", [True, False])
def test_every_item_gives_its_result_in_order(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not allowed:
        monkeypatch.setattr(_thread, "start_new_thread", no_thread)
    ran_in: set[int] = set()

    def square(number: int) -> int:
        ran_in.add(threading.get_ident())
        return number * number

    assert map_in_threads(square, range(200), 4) == [number * number for number in range(200)]
    assert map_in_threads(square, [], 4) == []
    assert allowed or ran_in == {threading.get_ident()}


def test_items_are_worked_on_at_once() -> None:
    together = threading.Barrier(3, timeout=20)
    assert map_in_threads(lambda _: together.wait() >= 0, range(3), 3) == [True] * 3


def test_the_first_error_is_raised_and_ends_the_work() -> None:
    begun = []

    def fail(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise ValueError("two")

    with pytest.raises(ValueError, match="two"):
        map_in_threads(fail, range(1000), 2)
    assert len(begun) < 1000
