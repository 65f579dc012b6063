"""Names to steps, order and selection."""

from pathlib import Path

import pytest

from merge_cli.errors import MismatchError, UsageError
from merge_cli.selection import Candidate, order_candidates, parse_amount, parse_label, select


@pytest.mark.parametrize(
    ("name", "step", "stage", "ingredient"),
    [
        ("checkpoint-500", 500, None, None),
        ("ckpt_1000", 1000, None, None),
        ("step1000", 1000, None, None),
        ("step_1000", 1000, None, None),
        ("step-001000-2BT", 1000, None, None),
        ("global_step500", 500, None, None),
        ("iter_0001000", 1000, None, None),
        ("epoch=3-step=1200", 1200, None, None),
        ("step1000-tokens4B", 1000, None, None),
        ("stage1-step5000-tokens21B", 5000, "stage1", None),
        ("stage2-ingredient1-step11931-tokens50B", 11931, "stage2", "ingredient1"),
        ("ckpt_000", 0, None, None),
        ("0001000", 1000, None, None),
        ("model_step_70.safetensors", 70, None, None),
        ("final", None, None, None),
        ("llama-7b", None, None, None),
    ],
)
def test_names_in_the_wild(name: str, step: int | None, stage: str | None, ingredient: str | None) -> None:
    label = parse_label(name)
    assert (label.step, label.stage, label.ingredient) == (step, stage, ingredient)


def run(*steps: int) -> list[Candidate]:
    return [Candidate(Path(f"ckpt_{step}"), step, None, None, -step) for step in steps]


def steps_of(candidates: object) -> list[int | None]:
    return [candidate.step for candidate in candidates]  # type: ignore[attr-defined]


def test_order_is_by_number_or_as_asked() -> None:
    assert steps_of(order_candidates(run(10, 9, 100), "step", True)) == [9, 10, 100]
    assert steps_of(order_candidates(run(10, 9, 100), "given", True)) == [10, 9, 100]
    assert steps_of(order_candidates(run(10, 9, 100), "mtime", True)) == [100, 10, 9]
    with pytest.raises(MismatchError, match="2 checkpoints have step 9"):
        order_candidates(run(9, 10, 9), "step", True)


def test_every_takes_the_nearest_within_a_tenth_and_lists_gaps() -> None:
    here = run(1000, 2010, 2500, 2995, 4000)
    assert steps_of(select(here, every=1000).candidates) == [1000, 2010, 2995, 4000]
    assert steps_of(select(here, every=1000, last=2).candidates) == [2995, 4000]
    with pytest.raises(MismatchError, match="1 checkpoints are missing") as refused:
        select(run(1000, 3000, 4000), every=1000)
    assert "near step 2000" in str(refused.value)


def test_ranges_and_last() -> None:
    here = run(1, 2, 3, 4, 5)
    assert steps_of(select(here, from_step=2, to_step=4).candidates) == [2, 3, 4]
    assert steps_of(select(here, before=4, last=2).candidates) == [2, 3]
    with pytest.raises(UsageError, match="more checkpoints than there are"):
        select(here, last=6)


def test_amounts() -> None:
    assert [parse_amount(text) for text in ("500", "2k", "1_000")] == [500, 2000, 1000]
    assert parse_amount("8B", 4_000_000) == 2000
    with pytest.raises(UsageError, match="tokens"):
        parse_amount("8B")
