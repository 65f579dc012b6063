"""F9: inputs that change during the run, also those that a process writes through a mapping, and
swapped side files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.attacks.world import PRECIOUS, Attack, Try, World, misbehavior, rank
from faults.ground import COMMAND, digests

SHARD = "model-00002-of-00002.safetensors"


def rename_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + b"abcd")
    other.rename(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def swap_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("aside"))
    path.parent.symlink_to("checkpoint-200")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


CHANGES: dict[str, Callable[[Path], object]] = {
    "replaced by one of the same size": rename_over,
    "truncated": lambda path: os.truncate(path, 1000),
    "appended to": append,
    "removed": lambda path: path.unlink(),
    "in a folder that becomes a link to another": swap_folder,
    "replaced by a FIFO": fifo,
    "replaced by a link to /dev/zero": endless,
}


def changed(world: World) -> Iterator[Try]:
    """A shard changes before and after it is opened, and after all of it was read."""
    before = world.folder / "before"
    shutil.copytree(world.folder / "in", before)
    for kind, command in (("lone", COMMAND), ("rank", rank(0))):
        for stop in (2, 5, 9):
            for what, change in CHANGES.items():
                world.reset()
                run = world.runs.start(command, world.folder, fault=f"pwrite:{stop}:signal:19:/out", timeout_s=20)
                if run.stops():
                    change(world.folder / "in" / "checkpoint-100" / SHARD)
                ended = run.end()
                shutil.rmtree(world.folder / "in")
                shutil.copytree(before, world.folder / "in")
                published = "published with exit 0" if ended.code == 0 else ""
                yield Try(f"at write {stop}, a shard is {what}, {kind}", misbehavior(ended) or published)
    shutil.rmtree(before)


MAPPER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
for page in range(0, len(mapped), 4096):
    mapped[page] = mapped[page]  # dirty from now on: later stores change neither size nor time
print("mapped", flush=True)
sys.stdin.readline()
mapped[-2000:-1000] = bytes([0, 64]) * 500
print("written", flush=True)
sys.stdin.readline()
"""


def mapped(world: World) -> Iterator[Try]:
    """Another process holds an input mapped, and writes to it in the middle of the run."""
    for where in ("here", "on tmpfs"):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if where == "on tmpfs" else world.folder) as copy:
            shutil.copytree(world.folder / "in", Path(copy) / "in")
            world.reset()
            command = [sys.executable, "-c", MAPPER, f"{copy}/in/checkpoint-100/{SHARD}"]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
                assert writer.stdin and writer.stdout and writer.stdout.readline()
                arguments = ("average", f"{copy}/in", *COMMAND[2:])
                run = world.runs.start(arguments, world.folder, fault="pwrite:3:signal:19:/out")
                if run.stops():
                    writer.stdin.write("\n")
                    writer.stdin.flush()
                    writer.stdout.readline()
                ended = run.end()
                writer.stdin.write("\n")
            broken = misbehavior(ended) or ("published with exit 0, a mix of old and new" if ended.code == 0 else "")
            yield Try(f"an input is written through a mapping, {where}", broken)


def swapped_side_file(world: World) -> Iterator[Try]:
    """A side file is exchanged for a link to a secret between the look at it and its opening."""
    path = world.folder / "in" / "checkpoint-200" / "tokenizer.json"
    for number in (1, 2, 3):
        for target in ("victim/precious.txt", "/dev/zero"):
            world.reset()
            fault = f"open:{number}:signal:19:checkpoint-200/tokenizer.json"
            run = world.runs.start(COMMAND, world.folder, fault=fault, timeout_s=20, room=3 << 30)
            if run.stops():
                path.unlink()
                path.symlink_to(world.folder / target)
            ended = run.end()
            path.unlink()
            path.write_text("{}")
            leaked = [name for name in digests(world.merged) if (world.merged / name).read_bytes() == PRECIOUS.encode()]
            broken = misbehavior(ended) or (f"a file from elsewhere was published as {leaked}" if leaked else "")
            yield Try(f"at opening {number}, a side file becomes a link to {target}", broken)


def tries(world: World) -> Iterator[Try]:
    for part in (changed, mapped, swapped_side_file):
        yield from part(world)


ATTACK = Attack("inputs", "F9", "Inputs that change during the run stop it, however they are written.", tries)
