"""Is a merged checkpoint still what pmerge wrote? The feature behind `pmerge verify`, as a library.

Everything is compared with `pmerge.json`, which ends with its own sha256 (`output/check.py`). With
`against_inputs` the recorded request is planned again, and everything is compared that would be
published: the record, the set of files, headers, index and side files byte for byte
(`output/published.py`), and the values of sampled tensors bit for bit (`recompute.py`). Reads only,
in bounded memory.

What cannot be found: a checkpoint replaced as a whole, `pmerge.json` and its checksum included. The
checksums guard against accidents; they are no signature. `against_inputs` does find whatever is not
the recorded average of the inputs; it trusts those.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from merge_cli.errors import InputError, UsageError
from merge_cli.formats.index import INDEX_SUFFIX
from merge_cli.formats.safetensors import MAX_HEADER_BYTES
from merge_cli.names import MANIFEST, SWEEP_REPORT
from merge_cli.output.check import Meter, check_files, check_index, check_metadata, listed_files, look_around
from merge_cli.output.manifest import MAX_MANIFEST_BYTES, is_sealed
from merge_cli.output.progress import Progress
from merge_cli.planning.plan import ALGORITHM
from merge_cli.planning.record import with_inputs_below
from merge_cli.stores.local import STORE as LOCAL
from merge_cli.stores.store import as_path, read_file
from merge_cli.system.files import read_json
from merge_cli.system.json_text import parse_json


@dataclass(frozen=True)
class Verification:
    """What was found. `files` maps each recorded file to "ok" or what is wrong with it; `problems`
    is empty where all holds.

    `notes` are files that pmerge did not write and that do no harm. `recomputed` of `num_tensors`
    tensors were computed again.
    """

    path: Path
    files: Mapping[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_read: int
    seconds: float
    recomputed: int = 0
    num_tensors: int = 0

    @property
    def ok(self) -> bool:
        """Whether all holds."""
        return not self.problems


def _name_a_result(folder: Path) -> str:
    """The hint for a `folder` that is no result: one beside it or in it, or the command for what
    it is.
    """
    near = sorted(each.parent for above in (folder, folder.parent) for each in above.glob(f"*/{MANIFEST}"))
    names = [str(each) for each in near]
    if names:
        best = (get_close_matches(str(folder), names, 1) or names)[0]
        return f"did you mean  pmerge verify {shlex.quote(best)}"
    if folder.is_dir():
        return f"only results of pmerge have one; for a checkpoint:  pmerge inspect {shlex.quote(str(folder))}"
    return f"list the folder:  ls {shlex.quote(str(folder.parent))}"


def verify(
    path: str | os.PathLike[str],
    *,
    against_inputs: bool = False,
    inputs_root: str | os.PathLike[str] | None = None,
    sample: int | None = 64,
    device: str = "auto",
    max_header: int = MAX_HEADER_BYTES,
    on_progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Check the merged checkpoint in the folder `path` against its `pmerge.json`.

    `against_inputs` also computes `sample` tensors, drawn at random (None: all), again from the
    recorded inputs, on `device`; `inputs_root` is the folder in which they lie now, if they have
    moved. What does not hold is in the result. Raises UsageError or
    InputError where there is no result of pmerge to check, BoundError where headers together are
    larger than `max_header` bytes.
    """
    folder = Path(as_path(path))
    if sample is not None and sample < 1:
        raise UsageError(f"a sample of {sample} tensors checks nothing", hint="--sample 64, or --sample all")
    if not folder.is_dir() or not os.path.lexists(folder / MANIFEST):
        raise InputError(
            f"no result of pmerge: {folder}",
            details=["expected  a folder with a pmerge.json"],
            hint=_name_a_result(folder),
        )
    began = time.perf_counter()
    manifest, state = _read_manifest(folder / MANIFEST)
    if state == "ok":
        _check_versions(manifest, folder, against_inputs)
    problems = [f"pmerge.json: has no `{key}`" for key in ("files", "side_files") if state == "ok" and key not in manifest]
    weights, beside = listed_files(manifest, "files", problems), listed_files(manifest, "side_files", problems)
    plan = todo = None
    if against_inputs and state == "ok" and not problems:
        from merge_cli.features.recompute import differing_tensors, restricted, tensors_of
        from merge_cli.output.published import differences, plan_again

        manifest = manifest if inputs_root is None else _with_inputs_below(manifest, inputs_root, folder)
        plan = plan_again(manifest, problems, max_header)
        todo = None if plan is None else restricted(plan, sample)
    meter = Meter(sum(r.file_bytes for r in (*weights.values(), *beside.values())), todo, on_progress)
    files = {MANIFEST: state, **check_files(folder, weights, beside, meter)}
    problems = [f"{folder / name}: {found}" for name, found in files.items() if found != "ok"] + problems
    if state == "ok":
        if any(name.endswith(".safetensors") for name in weights):
            problems += check_index(folder, weights, [name for name in beside if name.endswith(INDEX_SUFFIX)], max_header)
        else:
            problems += check_metadata(folder, max_header)
    strangers, notes = look_around(folder, {*weights, *beside, MANIFEST}, weights if against_inputs else None)
    problems += strangers
    if plan is not None and todo is not None:
        problems += differences(plan, manifest, folder)
        problems += differing_tensors(todo, manifest, folder, device, meter.add)
    return Verification(
        folder,
        files,
        tuple(problems),
        tuple(notes),
        meter.bytes_read,
        time.perf_counter() - began,
        0 if todo is None else len(tensors_of(todo)),
        0 if plan is None else len(tensors_of(plan)),
    )


def results_in(path: str | os.PathLike[str]) -> list[Path]:
    """The result at `path`; of a sweep's folder, the outputs that its sweep.json lists, missing
    ones too.
    """
    folder = Path(as_path(path))
    outputs = read_json(folder / SWEEP_REPORT).get("outputs") if not os.path.lexists(folder / MANIFEST) else None
    names = [each.get("name") for each in outputs if isinstance(each, dict)] if isinstance(outputs, list) else []
    return [folder / name for name in names if isinstance(name, str) and "/" not in name and name not in ("", ".", "..")] or [
        folder
    ]


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The content of `pmerge.json` ({} where it cannot be read), and "ok" or what is wrong with it."""
    try:
        LOCAL.check_inside(str(path.parent), str(path))
        raw = read_file(str(path), MAX_MANIFEST_BYTES)
        content = parse_json(raw, is_own=True)
    except ValueError as error:
        return {}, f"is not valid JSON: {error}"
    except InputError as error:
        return {}, error.message
    if not isinstance(content, dict):
        return {}, "is not a JSON object"
    return content, "ok" if is_sealed(raw) else "does not fit the sha256 at its own end: it was changed"


def _with_inputs_below(manifest: Mapping[str, Any], root: str | os.PathLike[str], folder: Path) -> dict[str, Any]:
    try:
        return with_inputs_below(manifest, as_path(root))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST} does not name inputs that may have moved: {error!r:.200}") from error


def _check_versions(manifest: Mapping[str, Any], folder: Path, against_inputs: bool) -> None:
    """Raise InputError for a result that this version of pmerge cannot judge; 0.1.0 recorded
    neither number.
    """
    from merge_cli.output.schema import check_schema

    check_schema(manifest, folder / MANIFEST, "check it with that version of pmerge, or a newer one", InputError)
    if against_inputs and (found := manifest.get("algorithm", 1)) != ALGORITHM:
        raise InputError(
            f"{folder} was computed by another version of pmerge, and its tensors cannot be computed again by this one",
            details=[f"found     algorithm {found!r:.40}", f"expected  algorithm {ALGORITHM}"],
            hint=f"pmerge verify {shlex.quote(str(folder))}  checks all the rest",
        )
