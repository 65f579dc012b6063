"""A result against all that its recorded request would publish, made from the inputs again.

    plan_again    the plan of `pmerge.json`, over its inputs as they are now
    differences   the record, the set of files, every byte around the values, index and side files

With the values of the tensors (`features/recompute.py`) that is the whole folder, so whoever
changes it and seals `pmerge.json` anew is found, unless the inputs agree with the change.

Not known, because no byte of the result and nothing in the inputs depends on it: the command line,
the versions, and a method or parameters that give the same coefficients. A step can be compared
only where the input has one in its trainer state: a name may be that of a link, and the record has
the path that it leads to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any
from zlib import crc32

from merge_cli.errors import InputError, PmergeError
from merge_cli.formats.dcp.entries import DROP
from merge_cli.formats.opening import Seen, open_recorded
from merge_cli.formats.safetensors import BoundError, Header, parse_header
from merge_cli.formats.weight_file import recorded_fingerprint
from merge_cli.names import MANIFEST
from merge_cli.output.manifest import digest, index_of, side_files
from merge_cli.planning.plan import MergePlan, OutputFile
from merge_cli.planning.record import describe_result, fingerprint, from_result, replan
from merge_cli.request.candidates import step_inside
from merge_cli.request.coefficients import Coefficients
from merge_cli.request.labels import Candidate
from merge_cli.request.selection import coefficients_of
from merge_cli.stores.store import join
from merge_cli.system.files import pieces_of, read_up_to

_LIBM = 1e-12  # other mathematical libraries may round exp and log otherwise in the last digit


def plan_again(manifest: Mapping[str, Any], problems: list[str], max_header: int) -> MergePlan | None:
    """The plan that `pmerge.json` describes, made from its inputs; None, and what has changed,
    where they are not the same. Raises BoundError.
    """
    try:
        seen = Seen(max_header)
        inputs = []
        for entry in manifest["inputs"]:
            then = {file["name"]: recorded_fingerprint(file) for file in entry["files"]}
            kept = manifest.get("training_state", DROP)
            checkpoint = open_recorded(entry["path"], then.keys(), seen=seen, training_state=kept)
            now = {file.name: {"name": file.name, **file.fingerprint} for file in checkpoint.files}
            problems += [
                f"{join(checkpoint.path, name)}: this input has changed since it was averaged, so nothing can be computed again"
                for name in sorted(now.keys() | then.keys())
                if name not in now or name not in then or {**now[name], **then[name]} != now[name]
            ]
            inputs.append(checkpoint)
        if problems:
            return None
        plan = replan(from_result(manifest), inputs)
        if not isinstance(manifest.get("nonfinite", {}), dict):
            raise TypeError("`nonfinite` is not an object")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problems.append(f"pmerge.json does not describe a run of this version of pmerge: {error!r:.200}")
        return None
    except BoundError:
        raise
    except PmergeError as error:
        problems.append(f"the inputs cannot be averaged again: {error.message}")
        return None
    if fingerprint(plan) != manifest.get("plan"):
        problems.append(
            "pmerge.json and its inputs give another plan than the one that was carried out; another version of pmerge?"
        )
        return None
    return plan


def differences(plan: MergePlan, manifest: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """A line for everything in `folder` that is not what `plan`, made again from `manifest`, would
    publish, but for the values of tensors.
    """
    yield from _of_the_record(plan, manifest, folder / MANIFEST)
    listed = manifest["files"]
    planned = {file.name: file for file in plan.files}
    for name in sorted(planned.keys() | listed.keys()):
        if name not in planned:
            yield f"{folder / name}: pmerge.json lists these weights, and its inputs do not give such a file"
        elif name not in listed:
            yield f"{folder / name}: its inputs give this file, and pmerge.json does not list it"
        elif listed[name]["bytes"] != planned[name].file_bytes:
            yield f"{folder / name}: is of {listed[name]['bytes']} bytes, its inputs give {planned[name].file_bytes}"
        elif difference := _around_the_values(folder / name, planned[name]):
            yield f"{folder / name}: {difference}"
    yield from _beside_the_weights(plan, manifest, folder)


def _of_the_record(plan: MergePlan, manifest: Mapping[str, Any], path: Path) -> Iterator[str]:
    """The fields of the request, the coefficients that its method gives, and the steps."""
    expected = json.loads(json.dumps(describe_result(plan)))
    for key in sorted(expected.keys() - {"inputs", "base"}):  # a base may be linked elsewhere by now; its position counts
        if manifest.get(key, expected[key]) != expected[key]:
            yield f"{path}: `{key}` is {manifest[key]!r:.80}, its inputs and its request give {expected[key]!r:.80}"
    for was, now in zip(manifest["inputs"], expected["inputs"], strict=True):
        if was.get("bytes", now["bytes"]) != now["bytes"]:
            yield f"{path}: `bytes` of {was['path']} is {was['bytes']!r:.40}, it has {now['bytes']}"
    nonfinite = manifest.get("nonfinite", {})
    if strange := sorted(nonfinite.keys() - {key for file in plan.files for extent in file.extents for key in extent.keys}):
        yield f"{path}: `nonfinite` counts in `{strange[0]}`, which is no tensor of the result"
    found = [Candidate(each["path"], step, None, None, 0) for each, step in zip(manifest["inputs"], plan.steps, strict=True)]
    try:
        given, _ = coefficients_of(found, plan.spec, "given")
    except PmergeError as error:
        yield f"{path}: its method and parameters cannot be used: {error.message}"
        return
    (output,) = plan.outputs
    if not _are_equal(given, output.coefficients):
        yield f"{path}: method {plan.spec.method} with its parameters does not give these coefficients"
    for candidate in found:
        step = step_inside(candidate.path)
        if step is not None and step != candidate.step:
            yield f"{path}: `step` of {candidate.path} is {candidate.step}, and it is step {step}"


def _are_equal(one: Coefficients, other: Coefficients) -> bool:
    """Whether both are the same average; floats but for the last digits."""
    exact = (one.numerators, one.denominator) == (other.numerators, other.denominator)
    return exact and all(isclose(a, b, rel_tol=_LIBM, abs_tol=_LIBM) for a, b in zip(one.values, other.values, strict=True))


def _around_the_values(path: Path, file: OutputFile) -> str:
    """ "" if every byte of a file that is no value is as planned: the header, and the gaps between
    values; else the difference.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""  # already reported: the record lists it
    try:
        header = read_up_to(fd, len(file.header), 0)
        if header != file.header:
            return _header_difference(header, file)
        begin = len(file.header)
        for gap in file.gaps:
            crc = 0
            for piece in pieces_of(fd, begin, gap.offset) if gap.trailer is not None else ():
                crc = crc32(piece, crc)
            if read_up_to(fd, gap.num_bytes, gap.offset) != gap.make(crc):
                return f"the bytes between values at byte {gap.offset} are not those that its inputs give"
            begin = gap.end
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def _header_difference(header: bytes, file: OutputFile) -> str:
    """The first difference of a header in words, as far as it can be read."""
    unlike = "its header is not the one that its inputs give"
    try:
        expected, found = (_by_name(parse_header(raw[8:], file.file_bytes, file.name)) for raw in (file.header, header))
    except InputError:
        return unlike
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{unlike}: `{name}` is {found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
    return f"{unlike}: its metadata or the order differs"


def _by_name(header: Header) -> dict[str, str]:
    tensors = header.tensors.items()
    return {name: f"{info.dtype} {list(info.shape)} at {info.start} to {info.end}" for name, info in tensors}


def _beside_the_weights(plan: MergePlan, manifest: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """The index and the side files: those of the base, as they are there now."""
    base = plan.inputs[plan.base]
    listed = dict(manifest["side_files"])
    index = index_of(plan)
    if index is not None:
        if index[0] not in listed:
            yield f"{folder / index[0]}: its inputs give this index, and pmerge.json does not list it"
        elif listed.pop(index[0])["sha256"] != digest(index[1]).sha256:
            yield f"{folder / index[0]}: is not the index that its inputs give"
    try:
        for name, data in side_files(base, plan.spec.dtype, plan.dequantized):
            entry = listed.pop(name, None)
            if entry is None:
                yield f"{folder / name}: {join(base.path, name)} exists, and pmerge.json does not list it"
            elif entry["sha256"] != digest(data).sha256:
                yield f"{folder / name}: is not what {join(base.path, name)} gives; one of the two has changed"
    except PmergeError as error:
        yield f"the side files cannot be compared: {error.message}"
        return
    for name in sorted(listed):
        yield f"{folder / name}: pmerge.json lists it, and {base.path} has no such file"
