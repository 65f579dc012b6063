"""Faults of what is around a run: limits, changing inputs, other runs, the remains of an earlier
one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from faults.ground import COMMAND, FILESYSTEMS, PMERGE, Ground, Row, digests, refused_then_continued, write_checkpoint


def pmerge(cwd: Path, *arguments: object, before: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """A run of the command as a process of its own, started by the shell after `before` (such as
    "ulimit -n 64").
    """
    script = f'{before + ";" if before else ""} exec "$0" "$@"'
    command = ["bash", "-c", script, *PMERGE, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


def file_size_limit(ground: Ground) -> Row:
    row = Row("ulimit -f", "exit 1, not killed by SIGXFSZ, continued without the limit")
    ground.reset()
    ended = ground.runs.run(COMMAND, ground.folder, limits={"RLIMIT_FSIZE": 8192})
    refused_then_continued(row, ended, "ulimit -f", ground.merged)
    wrong = ground.continued({})
    row.wrong += [wrong] if wrong else []
    return row


def few_descriptors(ground: Ground) -> Row:
    """More input files than `ulimit -n 64` allows to be open: works. Next to none: says so."""
    row = Row("ulimit -n 64, 16", "works with 64, says what is needed with 16")
    many = ground.folder / "many"
    for step in range(1, 61):
        write_checkpoint(many / "in" / f"checkpoint-{step}", step, 50)
    arguments = ("average", "in", "-o", "merged", "--threads", "4", "--quiet")
    ended = ground.runs.run(arguments, many, limits={"RLIMIT_NOFILE": 64})
    row.points += 1
    row.seen = f"exit {ended.code} with 120 input files"
    if ended.code:
        row.wrong.append(ended.stderr)
    for limit in range(8, 20):
        shutil.rmtree(many / "merged", ignore_errors=True)
        ended = ground.runs.run(arguments, many, limits={"RLIMIT_NOFILE": limit})
        row.points += 1
        if ended.code and ("Traceback" in ended.stderr or "open files" not in ended.stderr or (many / "merged").exists()):
            row.wrong.append(f"ulimit -n {limit}: exit {ended.code}: {ended.stderr.strip()[-500:]}")
    return row


def changed_inputs(ground: Ground) -> Row:
    """An input is truncated, grown, rewritten, replaced or removed while the run waits in the
    middle.
    """
    row = Row("input truncated, grown, rewritten, replaced, removed", "exit 1, the file is named, no destination")
    victim = ground.folder / "in" / "checkpoint-100" / "model-00002-of-00002.safetensors"
    content, status = victim.read_bytes(), victim.stat()

    def truncate() -> None:
        os.truncate(victim, len(content) // 2)

    def grow() -> None:
        victim.write_bytes(content + bytes(8))

    def rewrite() -> None:
        with victim.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"abcd")

    def rewrite_header() -> None:
        with victim.open("r+b") as file:
            file.seek(20)
            file.write(b" ")
        os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))

    def replace() -> None:
        victim.with_suffix(".new").write_bytes(content)
        victim.with_suffix(".new").replace(victim)

    for change in (truncate, grow, rewrite, rewrite_header, replace, victim.unlink):
        for fault in ("pwrite:3:signal:19:/out", "pwrite:9:signal:19:/out", "rename:6:signal:19:/out"):
            ground.reset()
            ended = ground.runs.run(COMMAND, ground.folder, fault=fault, when_stopped=change)
            refused_then_continued(row, ended, victim.name, ground.merged)
            victim.unlink(missing_ok=True)
            victim.write_bytes(content)
            os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    return row


def locks(ground: Ground) -> Row:
    """A second run while the first is stopped in the middle, with flock and without; then one after
    the first was killed.
    """
    row = Row("second run on the same destination", "exit 1, told who holds it; a dead holder's lock is taken over")
    for refuse in ({}, FILESYSTEMS["no flock"]):
        ground.reset()
        seen: list[subprocess.CompletedProcess[str]] = []
        pid = 0

        def second(seen: list[subprocess.CompletedProcess[str]] = seen) -> None:
            seen.append(pmerge(ground.folder, *COMMAND))

        ended = ground.runs.run(COMMAND, ground.folder, fault="pwrite:4:signal:19:/out", refuse=refuse, when_stopped=second)
        if not refuse:  # the second process uses flock, so it can only be refused by it
            pid = int(seen[0].stderr.partition("pid       ")[2].split()[0] or 0)
            refused_then_continued(row, seen[0], "another run is writing out/merged", ground.folder / "nowhere")
            if not all(word in seen[0].stderr for word in ("host", "since", "pmerge average in -o out/merged")) or not pid:
                row.wrong.append(f"the holder is not named: {seen[0].stderr}")
        if ended.code or digests(ground.merged) != ground.expected:
            row.wrong.append(f"the first run: exit {ended.code} {ended.stderr}")
        ground.reset()
        ground.runs.run(COMMAND, ground.folder, fault="pwrite:6:kill:0:/out", refuse=refuse)
        row.points += 1
        wrong = ground.continued(refuse)
        row.wrong += [wrong] if wrong else []
    return row


def another_request(ground: Ground) -> Row:
    """What is unfinished belongs to another method, or to inputs that have changed: refused, until
    --restart.
    """
    row = Row("unfinished run of another request", "exit 1 with the differences, --restart goes on")
    ground.reset()
    ground.runs.run((*COMMAND, "--method", "wma"), ground.folder, fault="rename:5:kill:0:/out")
    before = digests(ground.staging)
    ended = ground.runs.run(COMMAND, ground.folder)
    refused_then_continued(row, ended, "method  was wma, is sma", ground.merged)
    if "rational" in ended.stderr:
        row.wrong.append(f"values that follow from the method are listed too: {ended.stderr}")
    if "--restart" not in ended.stderr or any(
        value != before[name] for name, value in digests(ground.staging).items() if name != "lock"
    ):
        row.wrong.append("the way out is not named, or the staging folder was changed")
    wrong = ground.continued({}, arguments=(*COMMAND, "--restart"))
    row.wrong += [wrong] if wrong else []
    ground.reset()
    ground.runs.run(COMMAND, ground.folder, fault="rename:5:kill:0:/out")
    os.utime(ground.folder / "in" / "checkpoint-100" / "model-00001-of-00002.safetensors")
    ended = ground.runs.run(COMMAND, ground.folder)
    refused_then_continued(row, ended, "version  was mtime_ns ", ground.merged)
    return row


def damaged_finished_file(ground: Ground) -> Row:
    """Damage to a finished shard of an unfinished run: found by its size and time, or with
    --verify-resume by its sha256.
    """
    row = Row("finished shard damaged between the runs", "written again (with --verify-resume also if size and time agree)")
    for damage, flag in (("cut", ()), ("touched", ()), ("flipped", ("--verify-resume",)), ("record cut", ())):
        ground.reset()
        ground.runs.run(COMMAND, ground.folder, fault="open:10000:kill:0:/out", signals=())
        ground.reset()
        ground.runs.run(COMMAND, ground.folder, fault="renamedir:1:kill:0:/out")
        shard = ground.staging / "checkpoint" / "model-00001-of-00002.safetensors"
        status = shard.stat()
        if damage == "cut":
            os.truncate(shard, status.st_size - 1)
        elif damage == "record cut":
            os.truncate(ground.staging / "done" / f"{shard.name}.json", 20)
        else:
            with shard.open("r+b") as file:
                file.seek(-1, 2)
                last = file.read(1)
                file.seek(-1, 2)
                file.write(bytes([last[0] ^ 1]))
        if damage == "flipped":
            os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
        row.points += 1
        wrong = ground.continued({}, arguments=(*COMMAND, *flag))
        row.wrong += [f"{damage}: {wrong}"] if wrong else []
    return row
