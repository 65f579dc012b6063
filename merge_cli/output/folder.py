"""The staging folder: everything is written there before it gets its final name.

`OUT.pmerge-partial/` lies beside the destination, on the same filesystem:

    state.json      the request: options, fingerprints of the inputs, hash of the plan; and the command that began
    lock            held (flock) by the run that works on it
    partial/        files as they are written, each under a name of its process, see `engine/writer.py`
    done/           one record per finished file, see `records.py`
    checkpoint/     the complete files: shards, then side files and pmerge.json, the index last
    claims/, ranks/, control    with several ranks, see `joint.py`
    publish.json    the checkpoint that is about to get the final name, see `publish.py`
    replaced/       with --overwrite, the old result in the moment between two renames

A run that dies leaves the staging folder, and the same command continues with the files that are
not done. A staging folder of another request, or of inputs that have changed since, is an error
that names the differences: nothing is ever mixed. A run holds the folder, and the one above, open
from the moment in which it has the lock, and works through these descriptors (`system/held.py`): if
somebody removes the folder and another run begins there, the first one fails and the second never
notices.

This module knows the names and the content. Who may touch them when is decided by `solo.py`,
`joint.py`, and `publish.py`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_cli.engine.sink import Writer
from merge_cli.engine.writer import CHECKPOINT, shard_writer
from merge_cli.errors import OutputError, first_ten
from merge_cli.formats.weight_file import recorded_fingerprint
from merge_cli.names import STAGING_SUFFIX
from merge_cli.output.lock import Lock
from merge_cli.output.records import DONE, Records
from merge_cli.output.schema import SCHEMA, check_schema
from merge_cli.output.trust import PROBE, check_made_by_us
from merge_cli.planning.plan import WorkItem
from merge_cli.system.files import read_json
from merge_cli.system.held import GROWING, HeldFolder, is_of_dead

_DERIVED = {"coefficients", "rational", "plan"}  # of a state: they follow from the request and the inputs
_WITHOUT_STATE = {"lock", "lock.owner", "control", "control.owner", GROWING}
_STATE, _PUBLISH = "state.json", "publish.json"


def staging_path(destination: Path) -> Path:
    """The staging folder of a destination."""
    return destination.with_name(destination.name + STAGING_SUFFIX)


class StagingFolder:
    """The staging folder of `destination` for the request that `state` describes. `owners` are the
    uids of users whose files in it may be published, beside this user's.
    """

    def __init__(self, destination: Path, state: Mapping[str, Any], owners: Collection[int] = ()) -> None:
        self.destination = destination
        self.owners = owners
        self.path = staging_path(destination)
        self.checkpoint = self.path / CHECKPOINT
        self.ranks = self.path / "ranks"
        self.replaced = self.path / "replaced"
        self.state_file = self.path / _STATE
        self.publish_file = self.path / _PUBLISH
        self.state: Mapping[str, Any] = json.loads(json.dumps(state))
        self.above = HeldFolder(destination.parent)
        self.held = HeldFolder(self.path)
        self.records = Records(self.held, _hash_of(self.state))

    def hold(self, *locks: Lock) -> None:
        """Hold the folder in which these locks are, and the one above. Raises OSError or
        OutputError.
        """
        self.above.hold()
        self.held.hold(within=self.above)
        if not all(lock.is_in(self.held) for lock in locks):
            raise self.exchanged()
        if not self.held.is_on_same_mount(self.above):
            raise OutputError(
                f"{self.path} is on another filesystem than {self.destination.parent}: nothing can be renamed from there",
                hint=f"unmount it:  umount {shlex.quote(str(self.path))}",
            )

    def release(self) -> None:
        """Hold the folder no longer."""
        self.held.release()
        self.above.release()

    def is_exchanged(self) -> bool:
        """Whether the folder that is held has lost its name, or is another one now."""
        return self.held.fd >= 0 and not self.held.is_same()

    def exchanged(self) -> OutputError:
        """The error for a folder that has lost its name."""
        return OutputError(
            f"{self.path} was removed or exchanged while this run worked in it: its work is lost, and nothing was published",
            hint="find out who did that, then run the same command again",
        )

    def check_made_by_us(self, *, thoroughly: bool = True) -> None:
        """Raise OutputError if anything in the folder is a link or belongs to another user."""
        self.owners = check_made_by_us(self.path, thoroughly=thoroughly, owners=self.owners)

    def make(self, *more: str) -> None:
        """Create the folders, and state.json unless it is there. Raises OSError or OutputError."""
        for part in (GROWING, DONE, CHECKPOINT, *more):
            self.held.make_folder(part)
        if not self.state_file.exists():
            about = "an unfinished pmerge run: run the same command again to continue it, with --restart to begin afresh"
            made_by = {
                "schema": SCHEMA,
                "about": about,
                "command": shlex.join(["pmerge", *sys.argv[1:]]),
                "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            }
            self.held.write_file(_STATE, json.dumps({**made_by, "state": self.state}, indent=2).encode())
        self.records.request = _hash_of(read_json(self.state_file).get("state"))  # of an older version: in its form

    def recorded_state(self) -> dict[str, Any]:
        """The request that the folder was made for; {} if it has none."""
        return with_fingerprints(read_json(self.state_file).get("state"))

    def writer(self, item: WorkItem) -> Writer:
        """A writer of a file, or of a piece of one, in the growing checkpoint."""
        return shard_writer(item, self.held)

    def note_publishing(self, marker: Mapping[str, Any]) -> None:
        """Write publish.json."""
        self.held.write_file(_PUBLISH, json.dumps(marker).encode())

    def forget_publishing(self) -> None:
        """Remove publish.json."""
        self.held.remove(_PUBLISH)

    def check_schema(self) -> None:
        """Raise OutputError if a newer version of pmerge began the folder."""
        hint = "continue with that version, or throw its work away:  --restart"
        check_schema(read_json(self.state_file), self.state_file, hint, OutputError)

    def check_same_request(self) -> None:
        """Raise OutputError unless the folder belongs to this very request, or nothing in it is
        finished.
        """
        if not self.state_file.exists():
            names = {path.name for path in self.path.iterdir()} - _WITHOUT_STATE
            strange = sorted(name for name in names if not name.startswith(PROBE))
            if not any((self.path / name).is_file() or any((self.path / name).iterdir()) for name in strange):
                return
            raise OutputError(
                f"{self.path} holds files, and no state.json that says what they are",
                details=first_ten(strange),
                hint="look at it; to throw away what an earlier run left there, add --restart",
            )
        self.check_schema()
        if self.recorded_state() == self.state:
            return
        if not self.records.names():  # nothing is finished: nothing is lost by beginning afresh
            self.remove_state()
            return
        older = ", or of an older version of pmerge" if read_json(self.state_file).get("schema", 0) < SCHEMA else ""
        raise OutputError(
            f"{self.path} is the unfinished run of another request or of inputs that have changed since{older}",
            details=[*self.differences(), *self.begun_by()],
            hint="repeat the command that began it, or throw its work away:  --restart",
        )

    def differences(self) -> list[str]:
        """The first ten differences between the recorded request and this one, for people; values
        that follow from others only where nothing else differs.
        """
        was, now = self.recorded_state(), self.state
        causes, wanted = ({key: value for key, value in state.items() if key not in _DERIVED} for state in (was, now))
        return first_ten(differences(causes, wanted) or differences(was, now), "more differences")

    def begun_by(self) -> list[str]:
        """The command that began the work in the folder, as a line for people."""
        command = read_json(self.state_file).get("command")
        return [f"begun by  {command}"] if isinstance(command, str) else []

    def remove_state(self) -> None:
        """Remove state.json. Raises OSError."""
        self.held.remove(_STATE)

    def discard(self) -> None:
        """Remove the work of an earlier run, and nothing else. Raises OSError."""
        for part in (DONE, CHECKPOINT, GROWING, "claims", "ranks", _STATE):
            self.held.remove(part)
        for name in self.held.names("."):
            if name.startswith(PROBE):
                self.held.remove(name)

    def remove_left_by_dead(self) -> None:
        """Remove the torn files of processes that are known to be dead. Raises OSError."""
        for name in self.held.names(GROWING):
            if is_of_dead(name):
                self.held.remove(f"{GROWING}/{name}")

    def remove_content(self) -> None:
        """Remove all that any run writes into the folder, but for the locks. Raises OSError."""
        self.held.remove("replaced")
        self.discard()
        self.forget_publishing()

    def remove_if_empty(self) -> None:
        """Remove the folder unless there is something in it, which is then somebody else's."""
        with suppress(OSError):
            self.path.rmdir()


def with_fingerprints(state: Any) -> dict[str, Any]:
    """A recorded state with the inputs' fingerprints in the form of today; {} for anything else."""
    try:
        recorded = state["inputs"].items()
        inputs = {path: {name: recorded_fingerprint(file) for name, file in files.items()} for path, files in recorded}
    except (AttributeError, IndexError, KeyError, TypeError):
        return {}
    return {**state, "inputs": inputs}


def _hash_of(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def differences(was: Any, now: Any, where: str = "") -> list[str]:
    """A line for each difference between two JSON values: its place, the old and the new value."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [*was, *(key for key in now if key not in was)]
        return [
            line
            for key in keys
            for line in differences(was.get(key, "absent"), now.get(key, "absent"), f"{where}, {key}" if where else key)
        ]
    return [] if was == now else [f"{where}  was {_short(was)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value) if not isinstance(value, dict) else "present"
    return text if len(text) <= 60 else text[:57] + "..."
