"""The faults of several ranks that make one result, for `scripts/faults`: killed or stopped at any
call, late, without flock.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

from faults.ground import COMMAND, FILESYSTEMS, Ground, Row, digests
from faults.runs import Ended, FaultRuns


def rank(number: int, world_size: int = 3, *more: str) -> tuple[str, ...]:
    """The command of one rank of the usual run: two files on three ranks, which are cut."""
    return (*COMMAND, "--rank", str(number), "--world-size", str(world_size), *more)


def complete(ground: Ground, told: str) -> str:
    """ "" if the result stands, nothing is left behind and its path was told once, else what is
    wrong.
    """
    if digests(ground.merged) != ground.expected:
        left = sorted(str(path.relative_to(ground.out)) for path in ground.out.rglob("*"))
        return f"the result is not complete: {left}"
    if ground.staging.exists():
        return f"left behind: {sorted(str(path.relative_to(ground.staging)) for path in ground.staging.rglob('*'))}"
    return "" if told.split() == ["out/merged"] else f"told on stdout: {told!r}"


def killed(ground: Ground, fault: str, codes: tuple[int, ...], filesystem: str = "Linux", every: int = 1) -> Row:
    """Rank 1 meets the fault at its first, second ... call. Rank 0 then finishes for both; without
    flock rank 1 is run again.
    """
    call, action, value = fault.split(":")
    row = Row(f"rank 1 of 3: {fault}" + ("" if filesystem == "Linux" else f", {filesystem}"), "rank 0 finishes: the same bytes")
    refuse = FILESYSTEMS[filesystem]
    for k in range(1, 100_000, every):
        ground.reset()
        ended = ground.runs.run(rank(1), ground.folder, fault=f"{call}:{k}:{action}:{value}:/out", refuse=refuse)
        if not ended.fired:
            break
        row.points += 1
        told = ended.stdout
        wrong = ground.invariant()
        if ended.code not in codes or "Traceback" in ended.stderr:
            wrong = wrong or f"exit {ended.code}: {ended.stderr.strip()}"
        for number in (0, 1, 2, 0) if "flock" in filesystem else (0,):
            stood = digests(ground.merged) == ground.expected
            again = ground.runs.run(rank(number), ground.folder, refuse=refuse)
            told = again.stdout if stood and not number else told + again.stdout  # rank 0 tells of a result that stood
            wrong = wrong or (f"rank {number} exits {again.code}: {again.stderr.strip()}" if again.code else "")
        wrong = wrong or complete(ground, told)
        row.wrong += [f"at call {k}: {wrong}"] if wrong else []
    row.seen = f"exit {', '.join(map(str, codes))}"
    return row


def stopped(ground: Ground, every: int) -> Row:
    """Rank 1 stands still at its first, second ... call while rank 0 does all that it can; then
    rank 1 goes on.
    """
    row = Row("rank 1 of 3 stopped while rank 0 runs to its end", "both finish, or one says who is at work; the same bytes")
    waited = 0
    with FaultRuns() as others:
        for k in range(1, 100_000, every):
            ground.reset()
            seen: list[Ended] = []

            def meanwhile(seen: list[Ended] = seen) -> None:
                seen.append(others.run(rank(0), ground.folder))

            ended = ground.runs.run(rank(1), ground.folder, fault=f"any:{k}:signal:19:/out", when_stopped=meanwhile)
            if not ended.fired:
                break
            row.points += 1
            told = "".join(run.stdout for run in (*seen, ended))
            wrong = ground.invariant()
            for run in (*seen, ended):
                if run.code not in (0, 1) or "Traceback" in run.stderr or (run.code and "another run" not in run.stderr):
                    wrong = wrong or f"exit {run.code}: {run.stderr.strip()}"
            if any(run.code for run in (*seen, ended)) and digests(ground.merged) != ground.expected:
                waited += 1  # rank 1 was stopped with the control lock, which the test does not wait for
                told += ground.runs.run(rank(0), ground.folder).stdout
            wrong = wrong or complete(ground, told.split()[0] if told else "")  # rank 0 also tells of what stood when it came
            row.wrong += [f"at call {k}: {wrong}"] if wrong else []
    row.seen = f"at {waited} calls rank 0 had to be run again"
    return row


def launch(ground: Ground, numbers: list[int], world_size: int) -> list[subprocess.Popen[str]]:
    """Real processes, started together."""
    command = [sys.executable, "-m", "merge_cli"]
    return [
        subprocess.Popen(
            [*command, *rank(number, world_size)], cwd=ground.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for number in numbers
    ]


def together(ground: Ground, rounds: int, seed: int = 0) -> Row:
    """Real processes at the same time, some killed at random moments, then the rest once more."""
    row = Row("4 ranks at once, killed at random", "every round ends with the same bytes")
    numbers, kills = random.Random(seed), 0
    big = Ground(ground.folder / "together", ground.runs, 1 << 19)
    for number in range(rounds):
        big.reset()
        processes = launch(big, [0, 1, 2, 3], 4)
        victims = numbers.sample(processes, number % 4)
        for victim in victims:
            try:
                victim.wait(numbers.uniform(1.0, 3.0))
            except subprocess.TimeoutExpired:
                victim.send_signal(signal.SIGKILL)
                kills += 1
        outcomes = [(*process.communicate(timeout=120), process.returncode) for process in processes]
        told = "".join(stdout for stdout, _, _ in outcomes)
        row.points += 1
        failed = [stderr for _, stderr, code in outcomes if code not in (0, -9)]
        wrong = f"a rank failed: {failed[0].strip()}" if failed else big.invariant()
        if not big.merged.exists():
            told += big.runs.run(rank(numbers.randrange(4), 4), big.folder).stdout
        wrong = wrong or complete(big, told)
        row.wrong += [f"round {number}: {wrong}"] if wrong else []
    row.seen = f"{kills} kills"
    return row


def tries(ground: Ground, every: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """All of these by name."""
    for filesystem in ("Linux", "no renameat2 (NFS, Lustre)", "no flock", "no folder rename"):
        yield "ranks any:kill:0", lambda f=filesystem: killed(ground, "any:kill:0", (-9,), f, every)  # type: ignore[misc]
    for fault in ("pwrite:error:28", "fsync:error:5", "rename:error:5", "open:error:13"):
        yield f"ranks {fault}", lambda f=fault: killed(ground, f, (0, 1), every=every)  # type: ignore[misc]
    yield "ranks any:signal:15", lambda: killed(ground, "any:signal:15", (143,), every=every)
    yield "ranks stopped", lambda: stopped(ground, every)
    yield "ranks together", lambda: together(ground, 16 // every)
