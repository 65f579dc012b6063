"""The world of the attacks: inputs, a place for results, files of somebody else, two `pmerge` at
once.

An attack is a function of a `World` that yields its tries one after the other. Each says what was
tried and which promise it found broken, if any. Everything goes through the real command.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from faults.ground import COMMAND, Ground, digests
from faults.runs import Ended, FaultRuns

PRECIOUS = "hours of work"
VICTIMS = ("precious.txt", "model-00001-of-00002.safetensors", "chat_templates/mine.jinja")


class Try(NamedTuple):
    """One try of an attack: what it was, and the promise that it broke, "" where all held."""

    what: str
    broken: str


@dataclass(frozen=True)
class Attack:
    """An attack by name. `finding`: its first appearance; `promise`: the sentence that it tries to
    refute.
    """

    name: str
    finding: str
    promise: str
    tries: Callable[[World], Iterator[Try]]


class World(Ground):
    """Two checkpoints in `in`, results in `out`, and in `victim` the files of somebody else.

    `thorough`: whether every interleaving is tried, or some of each kind.
    """

    def __init__(self, folder: Path, runs: FaultRuns, stack: ExitStack, *, thorough: bool = True) -> None:
        super().__init__(folder, runs)
        self.thorough = thorough
        self.victim = folder / "victim"
        self._stack = stack

    @cached_property
    def others(self) -> FaultRuns:
        """A second server, for runs at the same time."""
        return self._stack.enter_context(FaultRuns())

    def reset(self, overwrite: bool = False) -> None:
        """An empty `out`, or one with the older result; and the victim's files as they were."""
        super().reset(overwrite)
        shutil.rmtree(self.victim, ignore_errors=True)
        (self.victim / "chat_templates").mkdir(parents=True)
        for name in VICTIMS:
            (self.victim / name).write_text(PRECIOUS)

    def touched(self) -> str:
        """ "" while the victim's files are what and where they were, and nothing is beside them;
        else the differences.
        """
        found = {str(path.relative_to(self.victim)): path for path in self.victim.rglob("*") if not path.is_dir()}
        missing = [f"{name} is gone" for name in VICTIMS if name not in found]
        changed = [f"{name} is changed" for name in VICTIMS if name in found and found[name].read_bytes() != PRECIOUS.encode()]
        added = [f"{name} is added" for name in sorted(found.keys() - set(VICTIMS))]
        return ", ".join((missing + changed + added)[:3])

    def wrong_result(self, right: Sequence[Mapping[str, str]] | None = None) -> str:
        """ "" if the destination is absent or one of the `right` results (default: the average),
        else what is wrong with it.
        """
        if not os.path.lexists(self.merged):
            return ""
        if linked := links_in(self.merged):
            return f"the result is or holds a link: {linked}"
        found = digests(self.merged)
        allowed = right or (self.expected,)
        if found in allowed:
            return ""
        nearest = min(allowed, key=lambda each: len(each.items() ^ found.items()))
        strangers, changed = sorted(found.keys() - nearest.keys()), [n for n in nearest if found.get(n) != nearest[n]]
        return f"published, and wrong: changed {changed}" if changed else f"published, with files that are not its own: {strangers}"

    def broken(self, *ended: Ended, right: Sequence[Mapping[str, str]] | None = None, mended: bool = False) -> str:
        """ "" if all promises held in these runs, else the first one that did not. `mended`: the
        last had to succeed.
        """
        for run in ended:
            if wrong := misbehavior(run):
                return wrong
        if changed := self.touched():
            return f"outside the output, {changed}"
        if digests(self.folder / "in") != self.inputs:
            return "the inputs changed"
        if wrong := self.wrong_result(right):
            return f"{wrong} (exit {', '.join(str(run.code) for run in ended)})"
        if ended and ended[-1].code == 0 and not self.merged.exists():
            return "exit 0, and nothing is published"
        if mended and ended[-1].code:
            return f"exit {ended[-1].code}: {first_line(ended[-1])}"
        return ""

    def half_done(self, *arguments: str, fault: str = "renamedir:1:kill:0:/out") -> None:
        """Leave the staging folder of a run that was killed, by default when all but the publishing
        was done.
        """
        ended = self.runs.run((*COMMAND, *arguments), self.folder, fault=fault)
        assert ended.code == -9 and self.staging.is_dir(), ended


def misbehavior(ended: Ended) -> str:
    """ "" for a run that ended by itself with exit 0, 1 or 2 and without a traceback."""
    if ended.hung:
        return "hangs"
    if "Traceback" in ended.stderr:
        return f"traceback: {ended.stderr.strip().splitlines()[-1][:160]}"
    if ended.code not in (0, 1, 2):
        return f"exit {ended.code}: {first_line(ended)}"
    if any(line.endswith(": None") for line in ended.stderr.splitlines()):
        return f"an error without a reason: {first_line(ended)}"
    if any(ord(character) < 32 and character not in "\n\t" for character in ended.stderr + ended.stdout):
        return "a control character reached the terminal"
    return ""


def first_line(ended: Ended) -> str:
    """The first error message of a run."""
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")] or ended.stderr.splitlines() or [""]
    return lines[0][:200]


def links_in(folder: Path) -> list[str]:
    """Links, and everything else that is neither a file nor a folder."""
    found = [folder, *folder.rglob("*")] if folder.is_dir() and not folder.is_symlink() else [folder]
    modes = [(path, path.lstat().st_mode) for path in found]
    return [path.name for path, mode in modes if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))]


def remove(path: Path) -> None:
    """Remove whatever has this name, without following a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def is_root() -> bool:
    return os.geteuid() == 0


def rank(number: int, *more: str, size: int = 2) -> tuple[str, ...]:
    """The command of one of several ranks."""
    return (*COMMAND, "--rank", str(number), "--world-size", str(size), *more)


def sealed(manifest: Mapping[str, object]) -> bytes:
    """The bytes of a `pmerge.json` with this content, its sha256 set anew: that is a checksum, so
    anybody can.
    """
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, indent=2).encode().removesuffix(b"\n}")
    return text + b',\n  "sha256": "%s"\n}\n' % hashlib.sha256(text).hexdigest().encode()
