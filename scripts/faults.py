"""Break `pmerge average` on purpose, in every way that this machine can, and say what survived.

    scripts/faults               every fault, a table at the end; exit code 1 if anything was lost
    scripts/faults --quick       every third point of the sweeps
    scripts/faults --only kill   the faults whose name contains "kill"
    scripts/faults --soak 100    besides, a hundred rounds of kill -9 at random moments

The invariant after every fault: the destination is absent or complete (with --overwrite: the old or the new result), nothing of the
inputs has changed, and the same command ends with the bytes of a run that nothing disturbed, and leaves no staging folder.

Mounting needs root; what this machine cannot do is listed with the reason, never as survived.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fault_ranks
import torch
from fault_runs import Ended, FaultRuns
from safetensors.torch import save_file

FILESYSTEMS: dict[str, dict[str, int]] = {
    "Linux": {},
    "no renameat2 (NFS, Lustre)": {"renameat2": errno.EINVAL},
    "no folder rename": {"renamedir": errno.EXDEV, "renameat2": errno.EINVAL},
    "no flock": {"flock": errno.ENOTSUP},
    "no fsync of folders or files": {"fsync": errno.EINVAL},
    "no fallocate": {"fallocate": errno.EOPNOTSUPP},
}
COMMAND = ("average", "in", "-o", "out/merged", "--threads", "1", "--quiet")
PMERGE = (sys.executable, "-m", "merge_cli")


class CannotTry(Exception):
    """This machine cannot inject that fault; the text says why."""


@dataclass
class Row:
    """One line of the table: how many points were tried, and what was wrong at which."""

    fault: str
    expected: str
    points: int = 0
    wrong: list[str] = field(default_factory=list)
    seen: str = ""
    skipped: str = ""

    @property
    def ok(self) -> bool:
        return self.points > 0 and not self.wrong


class Ground:
    """A folder with two small checkpoints `in`, an older result `old`, and the answer that a run without faults gives."""

    def __init__(self, folder: Path, runs: FaultRuns, elements: int = 3000) -> None:
        self.folder = folder
        self.runs = runs
        self.out = folder / "out"
        self.merged = self.out / "merged"
        self.staging = self.out / "merged.pmerge-partial"
        for step in (100, 200, 300):
            write_checkpoint(folder / "in" / f"checkpoint-{step}", step, elements)
        shutil.move(folder / "in" / "checkpoint-300", folder / "newer")
        self.inputs = digests(folder / "in")
        self.must(runs.run((*COMMAND, "--method", "wma"), folder))
        shutil.move(self.merged, folder / "old")
        self.old = digests(folder / "old")
        self.must(runs.run(COMMAND, folder))
        self.expected = digests(self.merged)
        assert self.expected != self.old

    def must(self, ended: Ended) -> None:
        if ended.code:
            raise SystemExit(f"a run without a fault failed:\n{ended.stderr}")

    def reset(self, overwrite: bool = False) -> None:
        """An empty `out`, or one with the old result in it."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        if overwrite:
            shutil.copytree(self.folder / "old", self.merged)

    def invariant(self, overwrite: bool = False) -> str:
        """ "" while nothing is lost or half there, else what is wrong."""
        if digests(self.folder / "in") != self.inputs:
            return "the inputs changed"
        found = digests(self.merged)
        if found == self.expected:
            return ""
        if overwrite:
            aside = digests(self.staging / "replaced")
            return "" if self.old in (found, aside) and (found == self.old or not found) else "the old result is lost"
        readable = any(name.endswith(".index.json") for name in found)
        return "a destination that is not complete" if self.merged.exists() and (readable or not self.staging.exists()) else ""

    def continued(self, refuse: Mapping[str, int], overwrite: bool = False, arguments: Sequence[str] = COMMAND) -> str:
        """Run the same command without the fault: "" if all is well at the end, else what is not."""
        complete = digests(self.merged) == self.expected
        again = self.runs.run((*arguments, *(["--overwrite"] if overwrite else [])), self.folder, refuse=refuse)
        if again.code and not (complete and "exists already" in again.stderr):
            return f"the next run exits {again.code}: {again.stderr.strip()}"
        if digests(self.merged) != self.expected:
            return "the next run gives other bytes"
        if self.staging.exists() and not again.code:
            return f"left behind: {sorted(str(p.relative_to(self.out)) for p in self.staging.rglob('*'))}"
        return ""


def write_checkpoint(folder: Path, step: int, elements: int) -> None:
    """Two shards, an index, a config, a tokenizer and a side file in a sub-folder; neighbours in `step` are close."""
    (folder / "chat_templates").mkdir(parents=True)
    generator = torch.Generator().manual_seed(step)
    weight_map = {}
    for shard in (1, 2):
        name = f"model-{shard:05d}-of-00002.safetensors"
        tensors = {f"layers.{shard}.{i}": torch.randn(elements, generator=generator).bfloat16() for i in range(3)}
        save_file(tensors, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_templates" / "tool.jinja").write_text("{{ tools }}")


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file; pmerge.json without how the run was started, and when the inputs were copied to their place."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_file():
            data = path.read_bytes()
            if path.name == "pmerge.json":
                manifest = {**json.loads(data), "command": "", "sha256": ""}
                for file in (file for entry in manifest["inputs"] for file in entry["files"]):
                    file |= {"mtime_ns": 0, "inode": 0}
                data = json.dumps(manifest, sort_keys=True).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


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
    """The fault "call:action:value" at the first, second, third ... call until a run is not hit by it any more."""
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
    yield plan("pread:kill:0", match="/in/", codes=(-9,))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        yield plan(f"any:signal:{int(number)}", codes=(128 + number,))
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


def pmerge(cwd: Path, *arguments: object, before: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """A run of the command as a process of its own, started by the shell after `before` (such as "ulimit -n 64")."""
    script = f'{before + ";" if before else ""} exec "$0" "$@"'
    command = ["bash", "-c", script, *PMERGE, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


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


def refused_then_continued(row: Row, ended: Ended | subprocess.CompletedProcess[str], text: str, out: Path) -> None:
    """Note whether a run ended with exit code 1, the text in its message, no traceback and no destination."""
    code = ended.code if isinstance(ended, Ended) else ended.returncode
    row.points += 1
    row.seen = ended.stderr.strip().splitlines()[0] if ended.stderr.strip() else f"exit {code}"
    if code != 1 or text not in ended.stderr or "Traceback" in ended.stderr:
        row.wrong.append(f"exit {code}: {ended.stderr.strip()}")
    if out.exists():
        row.wrong.append(f"{out} exists")


def space(ground: Ground) -> Row:
    """A tmpfs that is filled up while the run is at work: a real ENOSPC, then room, then the same command."""
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


def slow_storage(ground: Ground) -> Row:
    """A signal while an fsync takes ten seconds: in a worker, of a side file, and of the parent folder."""
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
    ended = ground.runs.run(
        (*COMMAND, "--overwrite"), ground.folder, fault="fsync:5:delay:10000:/out", signals=[(1.0, 15), (1.3, 15)]
    )
    row.points += 1
    if ended.seconds > 1.8 or ended.code not in (143, -15):
        row.wrong.append(f"the second signal: exit {ended.code} after {ended.seconds:.1f} s")
    row.seen = f"ended {slowest:.1f} s after the signal at the latest; at once at the second"
    return row


def changed_inputs(ground: Ground) -> Row:
    """An input is truncated, grown, rewritten, replaced or removed while the run waits in the middle."""
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
        os.utime(victim.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
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
    """A second run while the first is stopped in the middle, with flock and without; then one after the first was killed."""
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
    """What is unfinished belongs to another method, or to inputs that have changed: refused, until --restart."""
    row = Row("unfinished run of another request", "exit 1 with the differences, --restart goes on")
    ground.reset()
    ground.runs.run((*COMMAND, "--method", "wma"), ground.folder, fault="rename:5:kill:0:/out")
    before = digests(ground.staging)
    ended = ground.runs.run(COMMAND, ground.folder)
    refused_then_continued(row, ended, "method  was wma, is sma", ground.merged)
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
    refused_then_continued(row, ended, "mtime_ns  was", ground.merged)
    return row


def damaged_finished_file(ground: Ground) -> Row:
    """Damage to a finished shard of an unfinished run: found by its size and time, or with --verify-resume by its sha256."""
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


def power_loss(ground: Ground, every: int) -> Row:
    """Stop the run at each system call, copy the image of the filesystem it writes to, go on with the mounted copy."""
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


def strace_sweep(ground: Ground, every: int) -> Row:
    """The kills once more with strace, on the command as it is installed, without the library of the other sweeps."""
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
    """Kill at a random moment, again and again until a run is through; every other round with --overwrite, in two threads."""
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


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, as docs/reliability.md shows them."""
    lines = ["| fault | expected | points | survived | lost | seen |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        if row.skipped:
            lines.append(f"| {row.fault} | {row.expected} | 0 | - | - | not tried here: {row.skipped} |")
        else:
            lost = min(len(row.wrong), row.points)
            lines.append(f"| {row.fault} | {row.expected} | {row.points} | {row.points - lost} | {lost} | {row.seen[:120]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every third point of the sweeps")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="rounds of random kills")
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = 3 if options.quick else 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="pmerge-faults-") as folder, FaultRuns() as runs:
        Path(folder).chmod(0o755)
        ground = Ground(Path(folder) / "ground", runs)
        single = [space, inodes, fsync_fails, read_only, no_permission, file_size_limit, few_descriptors, slow_storage]
        single += [changed_inputs, locks, another_request, damaged_finished_file]
        tries = [*sweeps(ground, every), *((f.__name__, lambda f=f: f(ground)) for f in single)]
        tries += fault_ranks.tries(ground, every)
        tries += [("power_loss", lambda: power_loss(ground, 3 * every)), ("strace", lambda: strace_sweep(ground, 4 * every))]
        if options.soak:
            tries.append(("soak", lambda: soak(ground, options.soak)))
        for name, attempt in tries:
            if options.only not in name:
                continue
            try:
                row = attempt()
            except CannotTry as reason:
                row = Row(name, "", skipped=str(reason))
            rows.append(row)
            print(
                f"{'--' if row.skipped else 'ok' if row.ok else 'BAD':4}{row.fault}: {row.points} points",
                file=sys.stderr,
                flush=True,
            )
            for line in row.wrong[:5]:
                print(f"      {line}", file=sys.stderr)
    print(table(rows))
    return 0 if rows and all(row.ok or row.skipped for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
