"""Everything that would stop a run at its destination, found before any weight is read."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from merge_cli.errors import OutputError, UsageError
from merge_cli.output.existing import (
    already_there,
    corrupt_files,
    elsewhere,
    is_in_the_way,
    is_merged,
    is_published,
    strangers,
    would_remove,
)
from merge_cli.output.folder import staging_path
from merge_cli.output.trust import uids_of
from merge_cli.planning.plan import MergePlan
from merge_cli.ranks.shares import cut
from merge_cli.request.spec import RunConfig
from merge_cli.stores.store import is_local
from merge_cli.system.descriptors import descriptors_left, open_files_hint
from merge_cli.system.durable import output_error
from merge_cli.system.files import files_in

_OPEN_BESIDE = 16  # files that are open beside those of the results: inputs, and a few of the process


def check_destinations(plans: Mapping[Path, MergePlan], run: RunConfig, ranks: int = 1) -> list[UsageError | OutputError]:
    """The errors that a run would meet at its destinations (each with its plan, all in one folder),
    without reading weights. `ranks` processes make them.
    """
    problems: list[UsageError | OutputError] = []
    try:
        uids_of(run.trust_owner)
    except UsageError as error:
        problems.append(error)
    for destination, plan in plans.items():
        problems += _check_place(destination, plan)
        problems += _check_existing(destination, plan, run)
    problems += _check_open_files(len(plans))
    for destination in [*plans][:1]:
        where = destination if len(plans) == 1 else destination.parent
        problems += _check_parent(where, Path(os.path.realpath(destination)).parent, plans, ranks)
    return problems


def _check_open_files(results: int) -> list[OutputError]:
    """Whether all results of a sweep can be open at once: the folder of each, the one above, its
    lock, and two files at a time.
    """
    need, have = 5 * results + _OPEN_BESIDE, descriptors_left()
    if results == 1 or need <= have:
        return []
    return [
        OutputError(
            f"{results} results at once need more open files than this process may have",
            details=[f"need  {need}", f"have  {have}"],
            hint=f"{open_files_hint(need)}; or give some of the methods now, the others later",
        )
    ]


def _check_place(destination: Path, plan: MergePlan) -> list[UsageError | OutputError]:
    real = Path(os.path.realpath(destination))
    for checkpoint in plan.inputs:
        if not is_local(checkpoint.path):
            continue
        source = Path(os.path.realpath(checkpoint.path))
        if real == source or real.is_relative_to(source) or (checkpoint.root and source.is_relative_to(real)):
            return [
                UsageError(
                    f"the output {destination} is or contains the input {checkpoint.path}, or lies in it",
                    hint=f"inputs are never written to; {elsewhere(destination)}",
                )
            ]
    if os.path.ismount(destination):
        hint = f"write into a folder below it:  -o {destination / 'merged'}"
        return [OutputError(f"{destination} is a mount point, which no result can replace", hint=hint)]
    return []


def _check_existing(destination: Path, plan: MergePlan, run: RunConfig) -> list[OutputError]:
    """Whatever is at the destination and may not be replaced. The result of this plan is no
    problem, unless it is corrupt.
    """
    if not is_in_the_way(destination) or (staging_path(destination) / "publish.json").exists():
        return []
    if not run.overwrite:
        if not is_published(destination, plan):
            return [already_there(destination, plan)]
        names = corrupt_files(destination) if run.verify_existing else iter(())
        hint = "make it again:  --overwrite"
        return [OutputError(f"{destination / name} is not as it was written", hint=hint) for name in islice(names, 1)]
    if destination.is_symlink():
        real = os.path.realpath(destination)
        return [
            OutputError(
                f"--overwrite does not follow links, and {destination} is one",
                hint=f"-o {shlex.quote(real)}" if is_merged(Path(real)) else elsewhere(destination),
            )
        ]
    if not is_merged(destination):
        return [
            OutputError(
                f"--overwrite replaces results of pmerge only, and {destination} has no pmerge.json",
                hint=f"remove it yourself, or {elsewhere(destination)}",
            )
        ]
    found = (path.relative_to(destination).as_posix() for path in sorted(destination.rglob("*")) if not path.is_dir())
    others = strangers(destination, found)
    return [would_remove(destination, others)] if others else []


def _check_parent(where: Path, parent: Path, plans: Mapping[Path, MergePlan], ranks: int) -> list[OutputError]:
    """Whether what has to be written can be, judged by the nearest folder that exists."""
    hint = elsewhere(where)
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return [OutputError(f"cannot write {where}: {parent} is not a folder", hint=hint)]
    try:
        status = os.statvfs(parent)
    except OSError as error:
        return [output_error(error, f"cannot look at {parent}", parent)]
    if status.f_flag & os.ST_RDONLY:
        return [OutputError(f"cannot write in {parent}: its filesystem is read-only", hint=hint)]
    if long := _too_long(parent, plans):
        return [OutputError(f"{parent} cannot hold a file with a name of {len(os.fsencode(long))} bytes: {long}", hint=hint)]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [OutputError(f"no permission to write in {parent}", hint=hint)]
    return _check_space(where, parent, status, plans, ranks)


def _too_long(parent: Path, plans: Mapping[Path, MergePlan]) -> str:
    """The first part of an output file's name that this filesystem has no room for, "" if it has
    for all.
    """
    try:
        most = os.pathconf(parent, "PC_NAME_MAX")
    except (OSError, ValueError):
        return ""
    names = [
        name for plan in plans.values() for name in (*(file.name for file in plan.files), *plan.inputs[plan.base].side_files.kept)
    ]
    return next((part for name in names for part in name.split("/") if len(os.fsencode(part)) > most), "")


def _check_space(
    where: Path, parent: Path, status: os.statvfs_result, plans: Mapping[Path, MergePlan], ranks: int
) -> list[OutputError]:
    """Bytes and inodes against what the filesystem gives to this user; what an earlier run wrote
    counts as free. Of several ranks each may have a file that another one makes too.
    """
    staged = [path for destination in plans for path in files_in(staging_path(destination))]
    need = {
        "bytes": sum(plan.bytes_to_write + _written_twice(plan, ranks) for plan in plans.values()),
        "inodes": sum(2 * len(plan.files) + len(plan.inputs[plan.base].side_files.kept) + 12 for plan in plans.values()),
    }
    have = {"bytes": status.f_bavail * status.f_frsize, "inodes": status.f_favail}
    for path in staged:
        with suppress(OSError):
            have["bytes"] += path.stat().st_blocks * 512
    have["inodes"] = have["inodes"] + len(staged) if status.f_files else need["inodes"]  # 0: made as they are needed
    return [
        OutputError(
            f"not enough {'space' if what == 'bytes' else what} for {where}",
            details=[f"need  {need[what]} {what}", f"have  {have[what]} {what} free in {parent}"],
            hint="make room, or write to another filesystem:  -o PATH",
        )
        for what in need
        if have[what] < need[what]
    ]


def _written_twice(plan: MergePlan, ranks: int) -> int:
    """The bytes of one file for each rank but the first: the largest ones that are not cut into
    pieces, which all ranks write into the same file.
    """
    sizes = sorted((item.end for item in cut(plan.files, ranks) if item.is_whole), reverse=True)
    return sum(sizes[: ranks - 1])
