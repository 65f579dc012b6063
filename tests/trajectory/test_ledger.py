"""The ledger's rows on disk: appended whole or not at all, found again by key, read by several
ranks.
"""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from merge_cli.errors import InputError
from merge_cli.trajectory.compare import PAIRED, UPPER_BOUND, difference, sampling_error
from merge_cli.trajectory.ledger import Document, Ledger, Part, Row, key_of


def row(
    name: str = "step-100", loss: float = 1.5, *, parts: tuple[Part, ...] = (Part("ckpt_100", 100, "v", 1.0),), **more: Any
) -> Row:
    return Row(key_of(parts, "keep", f"cmd {name}"), name, parts, "keep", "cmd", {"loss": loss}, **more)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.pmerge")
    assert ledger.rows() == []
    first = row(loss=0.1 + 0.2, errors={"loss": 0.01}, documents=(Document(3.5, 2, 7),), weights={"a.safetensors": "ab"}, time=1.0)
    second = row("step-200", parts=(Part("a", None, "v1", 0.25), Part("b", 7, "v2", 0.75)), annealed_from=3, time=2.0)
    ledger.append(first)
    ledger.append(second)
    assert Ledger(tmp_path / "run.pmerge").rows() == [first, second]
    assert second.steps is None and first.steps == [100.0]


def test_a_later_row_replaces_one_of_the_same_key(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(row(loss=1.0, time=1.0))
    ledger.append(row(loss=2.0, time=2.0))
    assert [each.metrics["loss"] for each in ledger.rows()] == [2.0]


def test_ranks_append_to_their_own_files_and_read_all(tmp_path: Path) -> None:
    Ledger(tmp_path, 0).append(row("a", time=1.0))
    Ledger(tmp_path, 3).append(row("b", time=2.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger-3.jsonl", "ledger.jsonl"]
    assert [each.name for each in Ledger(tmp_path, 1).rows()] == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_torn_last_line_is_no_row_and_is_removed_by_the_next_append(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(row("a", time=1.0))
    whole = ledger.path.read_bytes()
    ledger.append(row("b", time=2.0))
    torn = ledger.path.read_bytes()[:-cut]
    ledger.path.write_bytes(torn)
    assert [each.name for each in ledger.rows()] == ["a"]
    ledger.append(row("c", time=3.0))
    assert [each.name for each in ledger.rows()] == ["a", "c"]
    assert ledger.path.read_bytes().startswith(whole)


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(row())
    ledger.path.write_bytes(b"{}\n" + ledger.path.read_bytes())
    with pytest.raises(InputError, match=r"ledger.jsonl, line 1 has no key"):
        ledger.rows()
    ledger.path.write_bytes(b"not json\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        ledger.rows()
    ledger.path.write_text(json.dumps({"schema": 99}) + "\n")
    with pytest.raises(InputError, match="newer pmerge"):
        ledger.rows()


def _append_many(folder: Path, number: int) -> None:
    for i in range(20):
        Ledger(folder).append(row(f"{number}-{i}", time=float(number)))


def test_two_processes_of_one_rank_lose_no_row(tmp_path: Path) -> None:
    """Processes, because the lock that keeps them apart is one of the kernel between open files."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(tmp_path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(Ledger(tmp_path).rows()) == 60


def test_the_key_depends_on_everything_that_decides_the_result() -> None:
    part = Part("ckpt_100", 100, "v", 1.0)
    keys = {
        key_of([part], "keep", "cmd"),
        key_of([part], "bf16", "cmd"),
        key_of([part], "keep", "cmd2"),
        key_of([part._replace(version="w")], "keep", "cmd"),
        key_of([part._replace(coefficient=1.0 + 1e-16)], "keep", "cmd"),
        key_of([part._replace(coefficient=1.0 + 3e-16)], "keep", "cmd"),
        key_of([part._replace(name="other")], "keep", "cmd"),
        key_of([part._replace(step=None)], "keep", "cmd"),
        key_of([part, part], "keep", "cmd"),
    }
    assert len(keys) == 8  # 1 + 1e-16 is 1


def with_documents(name: str, nats: list[float], errors: dict[str, float] | None = None) -> Row:
    documents = tuple(Document(each, 10, 40) for each in nats)
    loss = sum(nats) / (10 * len(nats)) if nats else 1.0
    return row(name, loss, documents=documents, errors=errors or {})


def test_differences_are_paired_by_document() -> None:
    hard = [1.0, 50.0, 9.0, 30.0, 5.0, 70.0]
    one = with_documents("one", hard)
    other = with_documents("other", [each - 0.5 - 0.1 * (-1) ** i for i, each in enumerate(hard)])
    found = difference(one, other, "loss")
    assert found.source == PAIRED and found.value == pytest.approx(0.05) and not found.is_tie
    assert found.error == pytest.approx(0.01 / 5**0.5, rel=1e-9)  # sd .1 nats a document of 10 tokens, n = 6
    assert difference(one, with_documents("same", [each + 0.1 * (-1) ** i for i, each in enumerate(hard)]), "loss").is_tie


def test_reported_errors_are_an_upper_bound_and_none_is_none() -> None:
    one, other = with_documents("a", [], {"loss": 0.03}), with_documents("b", [], {"loss": 0.04})
    found = difference(one, other, "loss")
    assert found.source == UPPER_BOUND and found.error == pytest.approx(0.05)
    plain = difference(with_documents("c", []), other, "loss")
    assert plain.error is None and not plain.is_tie
    assert sampling_error([one, other], {one.key: 2.0}, "loss") == pytest.approx((0.06, UPPER_BOUND))
