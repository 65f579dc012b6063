"""The promises of `Destination` and of the `Writer`s that it opens: one set of tests, run on a lone
run's destination, on that of one rank of several, and on pieces of files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from builders import training_run, write_run

from merge_cli import Rank, plan_average
from merge_cli.engine.sink import Writer
from merge_cli.errors import OutputError
from merge_cli.features.average import AveragePlan
from merge_cli.output.destination import Claim, Destination
from merge_cli.output.joint import JointDestination
from merge_cli.output.solo import SoloDestination
from merge_cli.planning.plan import WorkItem

BLOCK = 1000


@dataclass
class Case:
    """A plan of two files, and destinations for it, each of which would be one process."""

    plan: AveragePlan
    make: Callable[[AveragePlan], Destination]
    pieces: int
    made: list[Destination] = field(default_factory=list)

    def destination(self) -> Destination:
        return self.make(self.plan)

    def items(self) -> list[WorkItem]:
        return [item for file in self.plan.merge.files for item in self._items(WorkItem.whole(file))]

    def _items(self, whole: WorkItem) -> list[WorkItem]:
        if self.pieces == 1:
            return [whole]
        file = whole.file
        middle = len(file.header) + file.value_bytes // 2 // BLOCK * BLOCK
        return [WorkItem(file, whole.outputs, 0, middle), WorkItem(file, whole.outputs, middle, file.file_bytes)]


@pytest.fixture(params=["lone", "rank", "pieces"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    paths = write_run(tmp_path / "run", training_run({"w": torch.ones(40, 50), "b": torch.zeros(3000)}, 2), shards=2)
    if request.param == "lone":
        return Case(plan_average(paths, tmp_path / "out"), lambda plan: SoloDestination(plan.output, plan.merge, plan.run), 1)
    rank = Rank(0, 2, source="--rank")
    plan = plan_average(paths, tmp_path / "out", rank=rank)
    return Case(plan, lambda plan: JointDestination(plan.output, plan.merge, plan.run, rank), 2 if request.param == "pieces" else 1)


def blocks(item: WorkItem) -> list[tuple[int, bytes]]:
    """All bytes of an item's values, in any order."""
    begin = max(item.begin, len(item.file.header))
    end = min(item.end, item.file.file_bytes)
    made = [(offset, bytes([offset // BLOCK % 251]) * min(BLOCK, end - offset)) for offset in range(begin, end, BLOCK)]
    random.Random(7).shuffle(made)
    return made


def write(writer: Writer, item: WorkItem) -> list[bool]:
    return [writer.write(offset, memoryview(data)) for offset, data in blocks(item)]


def finish(destination: Destination, item: WorkItem) -> None:
    writer = destination.open(item)
    write(writer, item)
    destination.done(item, writer.finish(), {})


def test_an_item_is_claimed_once_and_recorded(case: Case) -> None:
    with case.destination() as destination:
        assert len(destination.missing()) == 2 and not destination.is_published and destination.reused == 0
        for item in case.items():
            assert destination.claim(item) is Claim.TAKEN
            finish(destination, item)
            if not isinstance(destination, SoloDestination):  # which is asked for missing files only
                assert destination.claim(item) is Claim.RECORDED
    assert not case.plan.output.exists()


def test_a_claim_that_is_given_back_can_be_taken_again(case: Case) -> None:
    with case.destination() as destination:
        item = case.items()[0]
        for _ in range(2):
            assert destination.claim(item) is Claim.TAKEN
            destination.release(item)
        assert len(destination.missing()) == 2


def test_only_the_call_after_which_all_bytes_are_there_says_so(case: Case) -> None:
    with case.destination() as destination:
        for item in case.items():
            assert destination.claim(item) is Claim.TAKEN
            writer = destination.open(item)
            answers = write(writer, item)
            assert answers == [*[False] * (len(answers) - 1), True]
            assert not writer.is_finished
            writer.finish()
            assert writer.is_finished


def test_the_header_comes_last_so_that_a_torn_file_is_no_checkpoint(case: Case) -> None:
    with case.destination() as destination:
        item = case.items()[0]
        assert destination.claim(item) is Claim.TAKEN
        writer = destination.open(item)
        write(writer, item)
        torn = [path.read_bytes() for path in (destination.folder.path / "partial").iterdir()]
        assert [data[: len(item.file.header)] for data in torn] == [bytes(len(item.file.header))]
        assert not any((destination.folder.path / "checkpoint").iterdir())
        writer.finish()


def test_threads_get_one_yes_between_them(case: Case) -> None:
    with case.destination() as destination:
        item = case.items()[0]
        assert destination.claim(item) is Claim.TAKEN
        writer, answers = destination.open(item), list[bool]()

        def some(part: int) -> None:
            for offset, data in blocks(item)[part::4]:
                answers.append(writer.write(offset, memoryview(data)))

        threads = [threading.Thread(target=some, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(answers) == 1 and len(answers) == len(blocks(item))
        writer.finish()


def test_an_abandoned_item_is_missing_and_can_be_made_again(case: Case) -> None:
    with case.destination() as destination:
        item = case.items()[0]
        assert destination.claim(item) is Claim.TAKEN
        writer = destination.open(item)
        offset, data = blocks(item)[0]
        writer.write(offset, memoryview(data))
        writer.abandon()
        assert writer.is_finished
        writer.abandon()
        destination.release(item)
        assert item.file.name in destination.missing()
        assert destination.claim(item) is Claim.TAKEN
        finish(destination, item)


def test_a_close_that_fails_is_no_error_of_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an NFS whose server was away: what was given up, or whom a claim belonged to, is no
    matter; the file of a piece is one.
    """
    close = os.close

    def failing(fd: int) -> None:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        close(fd)
        if is_file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with case.destination() as destination:
        item = case.items()[0]
        for give_up in (True, False):
            assert destination.claim(item) is Claim.TAKEN
            writer = destination.open(item)
            write(writer, item)
            with monkeypatch.context() as patch:
                patch.setattr(os, "close", failing)
                if give_up:
                    writer.abandon()
                else:
                    with pytest.raises(OutputError, match="Input/output error"):
                        writer.finish()
                destination.release(item)
            assert writer.is_finished and item.file.name in destination.missing()
        monkeypatch.setattr(os, "close", failing)


def test_work_is_kept_for_the_next_process_and_its_bytes_are_hashed(case: Case) -> None:
    with case.destination() as destination:
        for item in case.items():
            assert destination.claim(item) is Claim.TAKEN
            finish(destination, item)
    with case.destination() as destination:
        if case.pieces == 1:
            assert destination.missing() == [] and destination.reused == 2
            records = destination.begin_to_publish()
            for file in case.plan.merge.files:
                data = (destination.folder.path / "checkpoint" / file.name).read_bytes()
                assert data[: len(file.header)] == file.header
                assert records[file.name].sha256 == hashlib.sha256(data).hexdigest()
        else:
            assert all(destination.claim(item) is Claim.RECORDED for item in case.items())


def test_nothing_is_published_by_leaving(case: Case) -> None:
    with pytest.raises(ZeroDivisionError), case.destination() as destination:
        for item in case.items():
            assert destination.claim(item) is Claim.TAKEN
        raise ZeroDivisionError
    assert not case.plan.output.exists() and destination.folder.path.is_dir()
    with case.destination() as destination:  # the claims of the process that left are free
        assert all(destination.claim(item) is Claim.TAKEN for item in case.items())


def test_a_second_process_gets_no_claim_that_the_first_has(case: Case) -> None:
    with case.destination() as first:
        item = case.items()[0]
        assert first.claim(item) is Claim.TAKEN
        if isinstance(first, SoloDestination):
            with pytest.raises(OutputError, match="another"), case.destination():
                pass
            return
        with case.destination() as second:
            assert second.claim(item) is Claim.HELD
            first.release(item)
            assert second.claim(item) is Claim.TAKEN
            finish(second, item)
        assert first.claim(item) is Claim.RECORDED
