"""The part of a merge that each rank writes: pure arithmetic on the sizes of output files.

Every rank makes the same plan and computes the same shares from it: the output files, largest
first, each to the rank with the least so far. A file that is large against a share is cut into
pieces by byte ranges, at multiples of 4 MiB, so that two hosts never write into one page or stripe.
The number of pieces is a power of two, so the pieces of another world size are unions or halves of
these, and a run that is continued with more or fewer ranks keeps the finished ones.

A rank that has finished its share goes on with pieces that no other has begun (see
`output/joint.py`); shares decide who starts where.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from merge_cli.planning.plan import OutputFile, WorkItem

PIECE_ALIGNMENT = 4 << 20
MIN_PIECE_BYTES = 64 << 20
_BALANCED = 1.1  # the largest share over the mean with which files stay whole
_CUT_ABOVE = 0.25  # of a mean share: then no rank has more than 1.25 times the mean


def cut(
    files: Sequence[OutputFile], world_size: int, min_bytes: int | None = None, outputs: tuple[int, ...] = (0,)
) -> list[WorkItem]:
    """The pieces of `files` for `world_size` ranks, in the order of the plan, each for all of
    `outputs`.

    Files stay whole where that is balanced, since a file that is cut is read once more for its
    sha256; else those are cut that are large against a share. No piece is smaller than `min_bytes`
    (64 MiB), which is what taking turns is worth.
    """
    min_bytes = min_bytes or MIN_PIECE_BYTES
    mean = sum(file.file_bytes for file in files) / world_size
    whole = [WorkItem.whole(file, outputs) for file in files]
    if max((sum(piece.end for piece in share) for share in shares(whole, world_size)), default=0) <= _BALANCED * mean:
        return whole
    most = _CUT_ABOVE * mean
    pieces = []
    for file in files:
        count = 1
        while world_size > 1 and file.file_bytes / count > most and file.file_bytes / (2 * count) >= min_bytes:
            count *= 2
        alignment = min(PIECE_ALIGNMENT, min_bytes)
        ends = [file.file_bytes * i // count // alignment * alignment for i in range(1, count)] + [file.file_bytes]
        pieces += [WorkItem(file, outputs, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    return pieces


def shares(pieces: Sequence[WorkItem], world_size: int) -> list[list[WorkItem]]:
    """What each rank writes: largest first, each piece to the rank with the least so far. Shares
    keep the order of `pieces`.
    """
    loads = [(0, rank) for rank in range(world_size)]
    owner = {}
    for position in sorted(range(len(pieces)), key=lambda i: (pieces[i].begin - pieces[i].end, i)):
        load, rank = heapq.heappop(loads)
        owner[position] = rank
        heapq.heappush(loads, (load + pieces[position].end - pieces[position].begin, rank))
    found: list[list[WorkItem]] = [[] for _ in range(world_size)]
    for position, piece in enumerate(pieces):
        found[owner[position]].append(piece)
    return found


def order_of_work(pieces: Sequence[WorkItem], rank: int, world_size: int) -> list[WorkItem]:
    """All pieces in the order in which `rank` tries them: its share, then those that the next ranks
    would come to last.
    """
    found = shares(pieces, world_size)
    others = [piece for step in range(1, world_size) for piece in reversed(found[(rank + step) % world_size])]
    return [*found[rank], *others]
