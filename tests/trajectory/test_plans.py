"""Plans of evaluations over the steps of a run."""

import pytest

from merge_cli.errors import UsageError
from merge_cli.trajectory.plans import PLANS, finest, make_plan, spread_out, window

RUN = list(range(10, 3001, 10))


def names(kind: str, steps: list[int] = RUN) -> list[str]:
    return [entry["name"] for entry in make_plan(kind, steps)]


def test_auto_is_four_checkpoints_and_two_merges() -> None:
    assert names("auto") == [
        "step-2700",
        "step-2800",
        "step-2900",
        "step-3000",
        "sma-last8-every10-at3000",
        "sma-last8-every20-at3000",
    ]


def test_auto_with_the_ten_checkpoints_that_a_trainer_keeps() -> None:
    kept = list(range(820, 1001, 20))
    assert spread_out(kept) == [900, 940, 960, 1000]
    assert names("auto", kept)[4:] == ["sma-last8-every20-at1000", "sma-last5-every40-at1000"]


def test_auto_early_in_a_run_takes_no_merge_that_lags_a_quarter_of_it() -> None:
    early = list(range(100, 1001, 100))
    assert names("auto", early) == [
        "step-700",
        "step-800",
        "step-900",
        "step-1000",
        "sma-last6-every100-at1000",
        "sma-last3-every200-at1000",
    ]


def test_the_other_plans() -> None:
    short = list(range(100, 2001, 100))
    assert len(names("rolling", short)) == 20 + 18
    assert "sma-last3-every100-at300" in names("rolling", short) and "sma-last8-every100-at2000" in names("rolling", short)
    assert "wma-last16-every100-at2000" in names("grid", short) and "sma-last16-every200-at2000" not in names("grid", short)
    pairs = names("pairs", short)
    assert [name for name in pairs if "last2" in name] == [f"sma-last2-every{100 * 2**k}-at2000" for k in range(5)]
    assert "step-400" in pairs
    assert names("plane", short) == [
        "step-2000",
        "step-1100",
        "step-200",
        "sma-last2-every900-at2000",
        "sma-last2-every900-at1100",
        "sma-last2-every1800-at2000",
        "sma-last3-every900-at2000",
    ]


@pytest.mark.parametrize("kind", PLANS)
def test_every_entry_is_there_to_be_merged(kind: str) -> None:
    steps = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]  # one is missing
    for entry in make_plan(kind, [100 * step for step in steps]):
        at, every = entry["at"], entry.get("every", 100)
        assert entry["last"] <= window([100 * step for step in steps], every, at)


def test_uneven_steps_and_phases() -> None:
    assert finest([100, 200, 300, 500, 600]) == 100
    assert {entry["at"] for entry in make_plan("rolling", RUN, since=2900)} == set(range(2900, 3001, 10))
    with pytest.raises(UsageError, match="three checkpoints"):
        make_plan("auto", [100, 200])
    with pytest.raises(UsageError, match="cannot be 'best'"):
        make_plan("best", RUN)
