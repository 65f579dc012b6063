"""Shards that are numbered in their names: a set must be whole, and the index must name all of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_cli.errors import IncompleteError, InputError, first_ten
from merge_cli.stores.store import join

SHARD_NUMBER = re.compile(r"^(?:shard-\d+-)?(?P<stem>.+)[-_](?P<number>\d{1,7})-of-(?P<count>\d{1,7})\.safetensors$")
"""A shard of a numbered set; the writer of torch puts `shard-RANK-` before the name."""
_PART_NUMBER = re.compile(r"^(?P<stem>.+)[-_](?P<number>\d{4,7})\.safetensors$")


def check_numbering(folder: str, names: Sequence[str]) -> None:
    """Files named `x-00001-of-00003.safetensors` must be all there."""
    numbered = [match for match in map(SHARD_NUMBER.match, names) if match]
    counts: dict[str, set[str]] = {}
    for match in numbered:
        counts.setdefault(match["stem"], set()).add(match["count"])
    for stem, several in sorted(counts.items()):
        if len(several) > 1:
            raise InputError(
                f"{folder} holds shards of {len(several)} saves, and no index",
                details=[f"found     {stem}-...-of-{count}.safetensors" for count in sorted(several)],
                hint="move the files of the save that is not meant away",
            )
        (count,) = several
        _check_no_hole(folder, [match for match in numbered if match["stem"] == stem], int(count))
    parts = [match for match in map(_PART_NUMBER.match, names) if match and not SHARD_NUMBER.match(match[0])]
    for stem in sorted({match["stem"] for match in parts}):
        same = [match for match in parts if match["stem"] == stem]
        last = max(int(match["number"]) for match in same)
        _check_no_hole(folder, same, last + any(int(match["number"]) == 0 for match in same))


def _check_no_hole(folder: str, matches: Sequence[re.Match[str]], count: int) -> None:
    """Raise InputError unless the numbers of a set are `count` in a row, from 0 or from 1."""
    have = {int(match["number"]) for match in matches}
    first = 0 if 0 in have else 1
    missing = [number for number in range(first, first + count) if number not in have]
    if missing:
        like = matches[0]
        begin, end, width = like.start("number"), like.end("number"), len(like["number"])
        raise IncompleteError(
            f"{len(missing)} of {count} shards are missing in {folder}",
            details=first_ten([f"{like[0][:begin]}{number:0{width}d}{like[0][end:]}" for number in missing]),
        )


def check_no_forgotten_shard(folder: str, index_name: str, wanted: Sequence[str], stray: Sequence[str]) -> None:
    """Raise InputError for a file of the numbered set that the index names, which it does not name
    itself.
    """
    sets = {(match["stem"], match["count"]) for match in map(SHARD_NUMBER.match, wanted) if match}
    forgotten = [name for name in stray if (match := SHARD_NUMBER.match(name)) and (match["stem"], match["count"]) in sets]
    if forgotten:
        raise InputError(
            f"{join(folder, index_name)} does not name {len(forgotten)} shards of its own set",
            details=first_ten(forgotten),
            hint="the index is of a broken or an earlier save: save or copy the checkpoint again, or move those files away",
        )
