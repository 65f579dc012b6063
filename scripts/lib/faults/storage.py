"""Faults of the storage below a run: full, thin, read-only, slow, without permission, cut off from
power.

Mounting needs root; where something is not allowed, CannotTry says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.ground import COMMAND, CannotTry, Ground, Row, digests, refused_then_continued


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """Mount something at `folder`. Raises CannotTry where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
    except OSError as error:
        raise CannotTry(f"mount: {error}") from error
    if done.returncode:
        raise CannotTry(f"mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def image(path: Path, megabytes: int, *options: str) -> Path:
    """An ext4 filesystem in a sparse file. Raises CannotTry where it cannot be made."""
    with path.open("wb") as file:
        file.truncate(megabytes << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", *options, str(path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotTry(f"mkfs.ext4: {error}") from error
    return path


def space(ground: Ground) -> Row:
    """A tmpfs that is filled up while the run is at work: a real ENOSPC, then room, then the same
    command.
    """
    row = Row("tmpfs full", "exit 1, what is needed is said, continued once there is room")
    big = Ground(ground.folder / "big", ground.runs, 1 << 20)
    with mounted(ground.folder / "small", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as small:
        arguments = (*COMMAND[:3], str(small / "merged"), *COMMAND[4:])
        (small / "ballast").write_bytes(bytes(8 << 20))
        ended = ground.runs.run(arguments, big.folder)
        refused_then_continued(row, ended, "not enough space", small / "merged")
        (small / "ballast").write_bytes(bytes(1 << 20))
        shutil.copytree(big.folder / "old", small / "older")  # 12 MB of the 16: fits the check only without it
        shutil.rmtree(small / "older")
        filler = subprocess.Popen(
            ["bash", "-c", "until [ -e merged.pmerge-partial/checkpoint ]; do :; done; head -c 16M /dev/zero > fill"],
            cwd=small,
            stderr=subprocess.DEVNULL,
        )
        ended = ground.runs.run(arguments, big.folder, fault="fallocate:1:delay:1000:/small/")
        filler.wait()
        refused_then_continued(row, ended, "No space left on device", small / "merged")
        (small / "fill").unlink()
        (small / "ballast").unlink()
        ended = ground.runs.run(arguments, big.folder)
        if ended.code or digests(small / "merged") != big.expected:
            row.wrong.append(f"not continued: {ended.stderr}")
    return row


def inodes(ground: Ground) -> Row:
    row = Row("no inodes left", "exit 1 before anything is written")
    with mounted(ground.folder / "few", "-t", "tmpfs", "-o", "size=64m,nr_inodes=12", "tmpfs") as few:
        ended = ground.runs.run((*COMMAND[:3], str(few / "merged"), *COMMAND[4:]), ground.folder)
        refused_then_continued(row, ended, "not enough inodes", few / "merged")
        if any(few.iterdir()):
            row.wrong.append("something was written")
    return row


def fsync_fails(ground: Ground) -> Row:
    """An ext4 image of 64 MB on a tmpfs of 12 MB: writes succeed, only fsync finds out."""
    row = Row("writes succeed, fsync fails (thin image)", "exit 1, no destination")
    big = Ground(ground.folder / "thin", ground.runs, 1 << 20)
    with mounted(ground.folder / "backing", "-t", "tmpfs", "-o", "size=12m", "tmpfs") as backing:
        path = image(backing / "image", 64, "-O", "^has_journal")
        with mounted(ground.folder / "disk", "-o", "loop", str(path)) as disk:
            ended = ground.runs.run((*COMMAND[:3], str(disk / "merged"), *COMMAND[4:]), big.folder)
            refused_then_continued(row, ended, "cannot ", disk / "merged")
    return row


def read_only(ground: Ground) -> Row:
    row = Row("read-only filesystem", "exit 1, said to be read-only")
    with mounted(ground.folder / "ro", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs") as folder:
        ended = ground.runs.run((*COMMAND[:3], str(folder / "merged")), ground.folder)
        refused_then_continued(row, ended, "read-only", folder / "merged")
    return row


def no_permission(ground: Ground) -> Row:
    row = Row("folder without permission", "exit 1, said to be a matter of permission")
    folder = ground.folder / "theirs"
    folder.mkdir()
    folder.chmod(0o555)
    if os.getuid() == 0 and not os.access(ground.folder, os.X_OK):
        raise CannotTry("another user cannot enter the working folder")
    ended = ground.runs.run((*COMMAND[:3], "theirs/merged"), ground.folder, user=65534 if os.getuid() == 0 else None)
    refused_then_continued(row, ended, "no permission", folder / "merged")
    folder.chmod(0o755)
    (ground.folder / "a-file").write_text("")
    ended = ground.runs.run((*COMMAND[:3], "a-file/merged"), ground.folder)
    refused_then_continued(row, ended, "is not a folder", folder / "merged")
    return row


def slow_storage(ground: Ground) -> Row:
    """A signal while an fsync takes ten seconds: in a worker, of a side file, and of the parent
    folder.
    """
    row = Row("SIGTERM during a slow fsync, read, write", "exit 143 within two seconds, continued")
    slowest = 0.0
    for fault in ("fsync:%d:delay:10000:/out", "pwrite:%d:delay:10000:/out", "pread:%d:delay:10000:/in/"):
        for k in (2, 7, 12, 17, 22, 27) if "fsync" in fault else (2, 8):
            ground.reset()
            ended = ground.runs.run(COMMAND, ground.folder, fault=fault % k, signals=[(1.0, signal.SIGTERM)])
            if not ended.fired:
                continue
            row.points += 1
            slowest = max(slowest, ended.seconds - 1.0)
            if ended.code != 143 or ended.seconds > 3 or "run the same command again" not in ended.stderr:
                row.wrong.append(f"{fault % k}: exit {ended.code} after {ended.seconds:.1f} s: {ended.stderr}")
            wrong = ground.invariant() or ground.continued({})
            row.wrong += [wrong] if wrong else []
    ground.reset()
    ended = ground.runs.run(COMMAND, ground.folder, fault="fsync:5:delay:10000:/out", signals=[(1.0, 15), (1.3, 15)])
    row.points += 1
    if ended.seconds > 1.8 or ended.code not in (143, -15):
        row.wrong.append(f"the second signal: exit {ended.code} after {ended.seconds:.1f} s")
    row.seen = f"ended {slowest:.1f} s after the signal at the latest; at once at the second"
    return row


def power_loss(ground: Ground, every: int) -> Row:
    """Stop the run at each system call, copy the image of the filesystem it writes to, go on with
    the mounted copy.
    """
    row = Row("power loss (copy of the ext4 image, mounted)", "absent or complete in every copy, continued there")
    template = image(ground.folder / "template", 16)
    live, copy = ground.folder / "image", ground.folder / "image-copy"
    for overwrite in (False, True):
        for k in range(1, 10_000, every):
            shutil.copy(template, live)
            with mounted(ground.folder / "live", "-o", "loop", str(live)) as disk:
                if overwrite:
                    shutil.copytree(ground.folder / "old", disk / "merged")
                    os.sync()
                target = ["--overwrite"] if overwrite else []
                ended = ground.runs.run(
                    (*COMMAND[:3], "live/merged", *COMMAND[4:], *target),
                    ground.folder,
                    fault=f"any:{k}:signal:19:/live",
                    when_stopped=lambda: shutil.copy(live, copy),
                )
            if not ended.fired:
                break
            row.points += 1
            with mounted(ground.folder / "after", "-o", "loop", str(copy)) as disk:
                found = digests(disk / "merged")
                aside = digests(disk / "merged.pmerge-partial" / "replaced")
                allowed = (ground.expected, ground.old) if overwrite else (ground.expected, {})
                if found not in allowed and not (overwrite and not found and aside == ground.old):
                    row.wrong.append(f"at call {k}: neither absent nor complete: {sorted(found)}")
                again = ground.runs.run((*COMMAND[:3], "after/merged", *COMMAND[4:], *target), ground.folder)
                said = found == ground.expected and "exists already" in again.stderr
                if (again.code and not said) or digests(disk / "merged") != ground.expected:
                    row.wrong.append(f"at call {k}: not continued: exit {again.code} {again.stderr.strip()}")
    row.seen = "each copy held nothing, the old result or the whole new one"
    return row
