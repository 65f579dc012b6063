"""The staging folder must be pmerge's own: on shared scratch a stranger may have made it, or put
links into it.

Looked at when a run begins, before anything in it is opened or removed. The folder is then held,
and no link in it is followed (`system/held.py`).
"""

from __future__ import annotations

import os
import pwd
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from merge_cli.errors import OutputError, UsageError
from merge_cli.system.durable import foreign
from merge_cli.system.files import unless_gone

PROBE = ".probe-"  # a file that is made to see who owns it, and removed; a killed run may leave it
_REPLACED = "replaced"  # the old result of a user: links in it are the user's own, and are never followed


def uids_of(trusted: str | None) -> frozenset[int]:
    """The uid of the user, by name or number, of `--trust-owner`. Raises UsageError."""
    if trusted is None:
        return frozenset()
    try:
        return frozenset({int(trusted) if trusted.isdecimal() else pwd.getpwnam(trusted).pw_uid})
    except KeyError as error:
        raise UsageError(
            f"--trust-owner: there is no user {trusted} on this machine", hint="give the number:  id -u NAME"
        ) from error


def check_made_by_us(staging: Path, *, thoroughly: bool, owners: Collection[int] = ()) -> set[int]:
    """Raise OutputError unless the staging folder and its parts are real folders and files of this
    user, or of one of `owners`; the uids of all of them.

    Its parts are looked at, and `thoroughly` all that is in them. A folder that is missing is fine.
    Raises OSError.
    """
    users = {os.geteuid(), *owners}
    try:
        owner = os.lstat(staging)
    except FileNotFoundError:
        return users
    if not stat.S_ISDIR(owner.st_mode):
        raise foreign(staging)
    if owner.st_uid not in users:
        users.add(_uid_of_a_new_file(staging))  # root squash and FUSE give files to another user
    _check_owner(staging, owner, users)
    for path in _names_in(staging, thoroughly):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue  # another rank is at work
        is_file = stat.S_ISREG(status.st_mode)
        if not (stat.S_ISDIR(status.st_mode) or is_file) or (is_file and status.st_nlink > 1):
            raise foreign(path)
        _check_owner(path, status, users)
    return users


def _names_in(staging: Path, thoroughly: bool) -> Iterator[Path]:
    for folder, folders, files in os.walk(staging, onerror=unless_gone):
        yield from (Path(folder, name) for name in (*folders, *files))
        if not thoroughly:
            return
        if folder == str(staging) and _REPLACED in folders:
            folders.remove(_REPLACED)


def _check_owner(path: Path, status: os.stat_result, users: set[int]) -> None:
    if status.st_uid not in users:
        raise OutputError(
            f"{path} belongs to another user (uid {status.st_uid}), who could change it at any moment",
            details=[f"expected  uid {', '.join(map(str, sorted(users)))}"],
            hint=f"write to a folder of your own:  -o PATH; or, if you trust that user:  --trust-owner {status.st_uid}",
        )


def _uid_of_a_new_file(folder: Path) -> int:
    """The user that a file made here belongs to."""
    probe = folder / f"{PROBE}{secrets.token_hex(8)}"
    fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        return os.fstat(fd).st_uid
    finally:
        os.close(fd)
        with suppress(OSError):
            probe.unlink()
