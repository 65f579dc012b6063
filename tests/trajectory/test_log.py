"""Training logs: reading them, and what they say of a window."""

import json
from pathlib import Path

import pytest

from merge_cli.errors import InputError, UsageError
from merge_cli.trajectory.log import LogRow, read_log, schedule_of, tokens_at


def rows(*pieces: tuple[int, int, float, float]) -> list[LogRow]:
    """A learning rate that goes linearly from one value to another in each piece (first, end, from,
    to).
    """
    return [
        LogRow(step, start + (stop - start) * (step - first) / (end - first), step * 100.0)
        for first, end, start, stop in pieces
        for step in range(first, end, 50)
    ]


CONSTANT = rows((0, 500, 0.0, 1e-3), (500, 10_050, 1e-3, 1e-3))


@pytest.mark.parametrize(
    ("log", "first", "expected", "since"),
    [
        (CONSTANT, 8000, [], 500),
        (CONSTANT, 200, ["warm-up"], 500),
        (rows((0, 8000, 1e-3, 1e-3), (8000, 10_050, 1e-3, 0.0)), 8500, ["decay"], 10_000),
        (rows((0, 8000, 1e-3, 1e-3), (8000, 10_050, 1e-3, 0.0)), 6000, ["decay"], 10_000),
        (rows((0, 500, 0.0, 1e-3), (500, 10_050, 1e-3, 1e-4)), 8000, ["schedule"], 10_000),
        (rows((0, 9000, 1e-3, 1e-3), (9000, 10_050, 3e-4, 3e-4)), 8000, ["stages"], 9000),
        (rows((0, 9000, 1e-3, 1e-3), (9000, 10_050, 3e-4, 3e-4)), 9500, [], 9000),
        (rows((0, 10_050, 1e-3, 1e-3)), 100, [], 0),
        ([], 8000, [], None),
    ],
)
def test_schedule(log: list[LogRow], first: int, expected: list[str], since: float | None) -> None:
    found = schedule_of(log, first, 10_000)
    assert [each.name for each in found.findings] == expected
    assert found.constant_since == since


def test_a_restarted_counter_and_a_ramp() -> None:
    restarted = [*CONSTANT, *rows((0, 500, 1e-3, 1e-3))]
    assert "restart" in [each.name for each in schedule_of(restarted, 8000, 10_000).findings]
    ramp = [LogRow(step, 1e-3, step * 100.0 if step < 9000 else 900_000 + (step - 9000) * 200.0) for step in range(0, 10_050, 50)]
    assert [each.name for each in schedule_of(ramp, 8000, 10_000).findings] == ["ramp"]
    assert schedule_of(ramp, 9000, 10_000).findings == ()
    assert tokens_at(ramp, [8000, 9025]) == [800_000, 905_000]
    assert tokens_at(ramp, [8000, 20_000]) is None


def test_trainer_state(tmp_path: Path) -> None:
    state = {
        "global_step": 20,
        "log_history": [
            {"step": 10, "loss": 2.0, "learning_rate": 1e-3, "num_input_tokens_seen": 1000},
            {"step": 10, "eval_loss": 2.1},
            {"step": 20, "loss": float("nan"), "learning_rate": 1e-3, "num_input_tokens_seen": 2000},
            {"epoch": 1},
            "odd",
        ],
    }
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(state))
    assert read_log(path) == [LogRow(10, 1e-3, 1000), LogRow(10, None, None), LogRow(20, 1e-3, 2000)]
    path.write_text("{}")
    assert read_log(path) == []
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_log(path)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("iteration,lr,consumed_tokens,loss\n1,0.001,100,2\n2,0.001,200,\n,0.001,300,1\n3,n/a,,1\n")
    assert read_log(path) == [LogRow(1, 0.001, 100), LogRow(2, 0.001, 200), LogRow(3, None, None)]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no steps"):
        read_log(path)
