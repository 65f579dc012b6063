"""Sweeps: one fault at the first, second, third ... system call where it can happen, until a run is
not hit by it any more.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence

from faults.ground import COMMAND, FILESYSTEMS, PMERGE, CannotTry, Ground, Row


def sweep(
    ground: Ground,
    fault: str,
    *,
    match: str = "/out",
    filesystem: str = "Linux",
    overwrite: bool = False,
    codes: Sequence[int] = (1,),
    text: str = "",
    every: int = 1,
    first: int = 1,
) -> Row:
    """The fault "call:action:value" at the first, second, third ... call until a run is not hit by
    it any more.
    """
    call, action, value = fault.split(":")
    name = f"{fault} on {match}" + (", --overwrite" if overwrite else "") + ("" if filesystem == "Linux" else f", {filesystem}")
    row = Row(name, f"exit {' or '.join(map(str, codes))}, nothing lost, continued to the same bytes")
    refuse, seen = FILESYSTEMS[filesystem], set()
    for k in range(first, 100_000, every):
        ground.reset(overwrite)
        arguments = (*COMMAND, *(["--overwrite"] if overwrite else []))
        ended = ground.runs.run(arguments, ground.folder, fault=f"{call}:{k}:{action}:{value}:{match}", refuse=refuse)
        if not ended.fired:
            if ended.code:
                row.wrong.append(f"without the fault: exit {ended.code} {ended.stderr}")
            break
        row.points += 1
        seen.add(ended.code)
        wrong = ground.invariant(overwrite)
        if ended.code not in codes or "Traceback" in ended.stderr:
            wrong = wrong or f"exit {ended.code}: {ended.stderr.strip()}"
        if text and ended.code and text not in ended.stderr:
            wrong = wrong or f"the message lacks {text!r}: {ended.stderr.strip()}"
        wrong = wrong or ground.continued(refuse, overwrite)
        if wrong:
            row.wrong.append(f"at call {k}: {wrong}")
    row.seen = "exit " + ", ".join(map(str, sorted(seen)))
    return row


def sweeps(ground: Ground, every: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The sweeps by name: one fault at every place where it can happen."""

    def plan(fault: str, **options: object) -> tuple[str, Callable[[], Row]]:
        return fault, lambda: sweep(ground, fault, every=every, **options)  # type: ignore[arg-type]

    for filesystem in FILESYSTEMS:
        yield plan("any:kill:0", filesystem=filesystem, codes=(-9,))
    for filesystem in ("Linux", "no renameat2 (NFS, Lustre)", "no flock"):
        yield plan("any:kill:0", filesystem=filesystem, codes=(-9,), overwrite=True)
    yield "any:kill:0, distributed checkpoints", lambda: distributed(ground, every)
    yield plan("pread:kill:0", match="/in/", codes=(-9,))
    for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        yield plan(f"any:signal:{int(sent)}", codes=(128 + sent,))
    for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG):
        yield plan(f"pwrite:error:{number}", text=os.strerror(number))
        yield plan(f"pwrite:errors:{number}", text=os.strerror(number))
    yield plan("pwrite:short:0", codes=(0,))
    yield plan("pread:short:0", match="/in/", codes=(0,))
    yield plan("pread:error:5", match="/in/", codes=(1, 2), text=os.strerror(errno.EIO))
    yield plan("fsync:error:5", text=os.strerror(errno.EIO))
    yield plan("fsync:error:5", overwrite=True)
    yield plan("fsync:error:5", filesystem="no renameat2 (NFS, Lustre)", overwrite=True)
    yield plan("fsync:error:5", filesystem="no folder rename")
    yield plan("fsync:errors:28", text=os.strerror(errno.ENOSPC))
    yield plan("rename:error:5", text=os.strerror(errno.EIO))
    yield plan("rename:error:5", filesystem="no folder rename")
    yield plan("renamedir:error:5", text=os.strerror(errno.EIO))
    yield plan("renamedir:error:5", filesystem="no renameat2 (NFS, Lustre)", overwrite=True)
    yield plan("fallocate:error:28", text=os.strerror(errno.ENOSPC))
    yield plan("fallocate:error:27", text=os.strerror(errno.EFBIG))
    yield plan("open:error:13", codes=(0, 1))
    yield plan("open:error:24", codes=(0, 1))
    yield plan("mkdir:error:30", codes=(0, 1), text=os.strerror(errno.EROFS))
    yield plan("unlink:error:5", codes=(0, 1))
    yield plan("rmdir:error:5", codes=(0, 1))


def distributed(ground: Ground, every: int, first: int = 1) -> Row:
    """The kills once more over distributed checkpoints, whose `.metadata` is written last."""
    row = sweep(
        Ground(ground.folder / "distributed", ground.runs, distributed=True), "any:kill:0", codes=(-9,), every=every, first=first
    )
    row.fault += ", distributed checkpoints"
    return row


def strace_sweep(ground: Ground, every: int) -> Row:
    """The kills once more with strace, on the command as it is installed, without the library of
    the other sweeps.
    """
    row = Row("strace: SIGKILL at pwrite64, fsync, rename, renameat2", "nothing lost, continued to the same bytes")
    if not shutil.which("strace"):
        raise CannotTry("strace is not installed (apt-get install strace)")
    for call in ("pwrite64", "fsync", "rename", "renameat2"):
        for k in range(1, 1000, every):
            ground.reset()
            inject = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e"]
            command = [*inject, f"inject={call}:signal=SIGKILL:when={k}", *PMERGE, *COMMAND]
            done = subprocess.run(command, cwd=ground.folder, capture_output=True, text=True, timeout=120)
            if "strace:" in done.stderr:
                raise CannotTry(done.stderr.strip())
            if done.returncode == 0:
                break
            row.points += 1
            wrong = ground.invariant() or ground.continued({})
            row.wrong += [f"{call} {k}: {wrong}"] if wrong else []
    row.seen = "killed at each"
    return row


def soak(ground: Ground, rounds: int, seed: int = 0) -> Row:
    """Kill at a random moment, again and again until a run is through; every other round with
    --overwrite, in two threads.
    """
    row = Row(f"soak: {rounds} rounds of kill -9 at random moments", "equal bytes at the end of every round")
    big = Ground(ground.folder / f"soak-{rounds}", ground.runs, 1 << 18)
    numbers, kills, between = random.Random(seed), 0, 0
    big.reset()
    usual_s = big.runs.run(COMMAND, big.folder).seconds
    arguments = ["2" if argument == "1" else argument for argument in COMMAND]
    for number in range(rounds):
        overwrite = number % 2 == 1
        big.reset(overwrite)
        extra = ["--overwrite"] if overwrite else []
        for _ in range(10):
            ended = big.runs.run((*arguments, *extra), big.folder, signals=[(numbers.uniform(0.1, 1.0) * usual_s, signal.SIGKILL)])
            if ended.code != -9:
                break
            kills += 1
            between += (big.staging / "done").is_dir()
            wrong = big.invariant(overwrite)
            row.wrong += [f"round {number}: {wrong}"] if wrong else []
        wrong = big.continued({}, overwrite, arguments)
        row.wrong += [f"round {number}: {wrong}"] if wrong else []
        row.points += 1
    row.seen = f"{kills} kills, {between} of them with work begun, {rounds} equal results"
    return row
