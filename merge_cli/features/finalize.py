"""Publish by hand what ranks have finished: the feature behind `pmerge finalize`, as a library."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

from merge_cli.errors import InputError, OutputError, UsageError, first_ten
from merge_cli.formats.opening import Seen, open_recorded
from merge_cli.formats.safetensors import MAX_HEADER_BYTES
from merge_cli.names import MANIFEST, STAGING_SUFFIX
from merge_cli.planning.record import describe, from_state, moved_paths, replan
from merge_cli.request.spec import RunConfig
from merge_cli.stores.store import StrPath, as_path


def finalize(
    destination: StrPath,
    *,
    overwrite: bool = False,
    inputs_root: StrPath | None = None,
    max_header: int = MAX_HEADER_BYTES,
    trust_owner: str | None = None,
) -> Path:
    """Publish the result whose ranks have finished all files without one of them publishing it;
    returns its path. `inputs_root` is the folder in which its inputs lie now, if they have moved;
    `trust_owner` another user, by name or uid, who may own files of the ranks.

    Raises OutputError, naming the files that are missing, if there are any; InputError if inputs
    have changed since.
    """
    from merge_cli.job import Job, carry_out
    from merge_cli.output.folder import differences, staging_path, with_fingerprints
    from merge_cli.output.schema import check_schema
    from merge_cli.system.files import read_json

    path = Path(as_path(destination))
    path = path.with_name(path.name.removesuffix(STAGING_SUFFIX)) if path.name.endswith(STAGING_SUFFIX) else path
    folder = staging_path(path)
    record = read_json(folder / "state.json")
    if not record:
        if (path / MANIFEST).is_file() and not os.path.lexists(folder):
            return path
        raise UsageError(
            f"there is no unfinished run for {path}",
            details=[f"looked for  {folder / 'state.json'}"],
            hint=f"list those that there are:  ls -d {shlex.quote(str(path.parent))}/*{STAGING_SUFFIX}",
        )
    check_schema(record, folder / "state.json", "finalize it with that version of pmerge, or a newer one", OutputError)
    try:
        state, command = with_fingerprints(record["state"]), record["command"]
        planned = from_state(state)
        seen = Seen(max_header)
        kept = planned.spec.training_state
        places = moved_paths(planned.paths, as_path(inputs_root)) if inputs_root is not None else {}
        opened = [
            open_recorded(places.get(each, each), state["inputs"][each].keys(), seen=seen, training_state=kept)
            for each in planned.paths
        ]
        merge = replan(planned, [replace(each, path=path) for each, path in zip(opened, planned.paths, strict=True)])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{folder / 'state.json'} does not describe a run of this version of pmerge: {error!r:.200}",
            hint="run the command that began it again; to throw its work away, add --restart",
        ) from error
    if changed := differences(state, json.loads(json.dumps(describe(merge)))):
        raise InputError(f"the inputs of {path} have changed since its ranks began", details=first_ten(changed, "more differences"))
    run = RunConfig(overwrite=overwrite, trust_owner=trust_owner)
    (result,) = carry_out(Job(merge, ((path, merge),), run, None, command=shlex.split(command))).outputs
    if result.missing:
        raise OutputError(
            f"{len(result.missing)} of {len(merge.files)} files of {path} are not finished",
            details=first_ten(result.missing),
            hint=f"run the ranks again, they do only what is missing:  {command}",
        )
    return path
