"""Feed changed bytes to every parser through the real command, for some seconds, and keep what
broke a promise.

A case is made by its number alone. Bytes that once broke something are in `seeds/`, one file each,
named TARGET--CHOICE--NUMBER, and are tried first.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from faults.attacks.world import World, first_line, links_in, misbehavior
from faults.fuzz.targets import VERIFY, Target, targets, write_kinds
from faults.ground import COMMAND, digests
from faults.runs import FaultRuns

SEEDS = Path(__file__).with_name("seeds")
PEAK = 3 << 29
ROOM = 4 << 30


class Case(NamedTuple):
    """Bytes for one of a target's files; `choice` picks the file and the command."""

    target: Target
    choice: int
    data: bytes
    number: int  # -1 for a kept one

    @property
    def file(self) -> str:
        return self.target.files[self.choice % len(self.target.files)]

    @property
    def command(self) -> tuple[str, ...]:
        return self.target.commands[self.choice // 8 % len(self.target.commands)]


class Fuzzer:
    """A world with all that is fuzzed in it, and the verdict on one case."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.targets = {target.name: target for target in targets()}
        write_kinds(world)
        for name, command in (("staged", COMMAND), ("staged-by-ranks", (*COMMAND, "--rank", "0", "--world-size", "2"))):
            world.reset()
            world.must(world.runs.run(COMMAND, world.folder))
            if name == "staged":
                shutil.move(world.merged, world.folder / "expected")
            world.reset()
            world.half_done(*command[len(COMMAND) :])
            shutil.move(world.staging, world.folder / name)
        self.files = set(world.folder.iterdir())

    def kept(self) -> Iterator[Case]:
        for path in sorted(SEEDS.glob("*--*--*")):
            name, choice, _ = path.name.split("--")
            yield Case(self.targets[name], int(choice), path.read_bytes(), -1)

    def made(self, number: int) -> Case:
        """The case of this number."""
        target = list(self.targets.values())[number % len(self.targets)]
        numbers = random.Random(f"{target.name} {number}")
        case = Case(target, numbers.randrange(1 << 20), b"", number)
        self.prepare(target)
        return case._replace(data=target.change((self.world.folder / case.file).read_bytes(), numbers))

    def prepare(self, target: Target) -> None:
        self.world.reset()
        target.prepare(self.world)

    def broken(self, case: Case) -> str:
        """ "" if all promises hold for this case, else the first that does not."""
        world = self.world
        self.prepare(case.target)
        (world.folder / case.file).write_bytes(case.data)
        ended = world.runs.run(case.command, world.folder, timeout_s=30, room=ROOM)
        if wrong := misbehavior(ended) or world.touched():
            return wrong
        if ended.peak_bytes > PEAK:
            return f"takes {ended.peak_bytes >> 20} MiB"
        if digests(world.folder / "in") != world.inputs:
            return "the inputs changed"
        if (
            strays := {path.name for path in world.folder.iterdir()}
            - {path.name for path in self.files}
            - {"out", "victim", "fuzzed"}
        ):
            return f"written elsewhere: {sorted(strays)}"
        if case.target.name.startswith("staging") and os.path.lexists(world.merged):
            return self.wrong_files()
        if case.target.verify and ended.code == 0 and case.command[0] == "average":
            verified = world.runs.run(VERIFY, world.folder)
            return "" if verified.code == 0 else f"exit 0, and verify says: {first_line(verified)}"
        return ""

    def wrong_files(self) -> str:
        """What is wrong with a result whose records were changed; a wrong sha256 in one is passed
        on, and found by `verify`.
        """
        if linked := links_in(self.world.merged):
            return f"the result is or holds a link: {linked}"
        there, right = digests(self.world.merged), self.world.expected
        wrong = sorted(name for name in there.keys() | right.keys() if there.get(name) != right.get(name) and name != "pmerge.json")
        return f"published, and wrong: {wrong}" if wrong else ""


def carry_out(seconds: float, first: int = 0, keep: Path | None = None) -> bool:
    """Try the kept seeds, then new cases from number `first` on until the time is over; whether all
    promises held.

    Bytes that break one are written to the folder `keep`, once for each way to break.
    """
    began = time.monotonic()
    counts, broken = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="pmerge-fuzz-") as folder, ExitStack() as stack:
        fuzzer = Fuzzer(World(Path(folder) / "world", stack.enter_context(FaultRuns()), stack))
        for case in chain(fuzzer.kept(), map(fuzzer.made, count(first))):
            if case.number >= 0 and time.monotonic() - began > seconds:
                break
            counts[case.target.name] += 1
            if not (wrong := fuzzer.broken(case)):
                continue
            way = f"{case.target.name}: {re.sub('[0-9]+', 'N', wrong)[:80]}"
            broken[way] += 1
            if broken[way] == 1:
                label = case.number if case.number >= 0 else "kept"
                print(f"      BROKEN  {case.target.name} {label}, {' '.join(case.command[:2])}: {wrong}", flush=True)
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{case.target.name}--{case.choice}--{case.number}").write_bytes(case.data)
    print("      " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    total = f"{sum(counts.values())} cases from number {first}, {sum(broken.values())} broken in {len(broken)} ways"
    print(f"{'FAIL' if broken else 'PASS'}  fuzz: {total}, {time.monotonic() - began:.0f} s", flush=True)
    return not broken
