"""F4: two ranks write one file, since `flock` is local to each host (localflock, local_lock) or a
lease has expired.

Two may do one piece, with the same bytes: at every moment the destination is absent or right, and
the ranks between them publish it, also when one never comes back.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

from faults.attacks.world import Attack, Try, World, first_line, rank

WHOLE = {"MIN_PIECE_BYTES": 64 << 20}  # files are not cut
LOCAL_FLOCK = {"flock": 0}  # always succeeds
FIRST = "model-00001-of-00002.safetensors"


def tries(world: World) -> Iterator[Try]:
    """Both ranks stopped while they write the same shard, or anywhere; one goes on to its end, then
    the other, or it is killed.
    """
    if world.thorough:
        yield from pairs(world, FIRST, range(1, 6), range(1, 6), WHOLE)
        yield from pairs(world, "/out", range(2, 17, 3), range(3, 17, 3), WHOLE)
        yield from pairs(world, "/out", range(2, 17, 3), range(3, 17, 3), {})
    else:
        yield from pairs(world, FIRST, (2, 3), (1, 2), WHOLE)
        yield from pairs(world, "/out", (5, 8), (4, 9), {})


def pairs(
    world: World, match: str, one: range | tuple[int, ...], other: range | tuple[int, ...], cut: dict[str, int]
) -> Iterator[Try]:
    for at in one:
        for after in other:
            for then in ("goes on", "is killed"):
                what = f"{'whole files' if cut else 'pieces'}: stopped at writes {at} and {after} of {match}, the second {then}"
                yield Try(what, interleaved(world, match, at, after, then, cut))


def interleaved(world: World, match: str, at: int, after: int, then: str, cut: dict[str, int]) -> str:
    world.reset()
    size = 2 if cut else 3  # two files of three ranks are cut into pieces
    runs = []
    for number, server, stop in ((0, world.runs, at), (1, world.others, after)):
        fault = f"pwrite:{stop}:signal:19:{match}"
        run = server.start(
            rank(number, "--chunk-size", "4096", size=size), world.folder, fault=fault, refuse=LOCAL_FLOCK, constants=cut
        )
        runs.append((run, run.stops()))
    first = runs[0][0].end()
    between = world.broken(first) if first.code or world.merged.exists() else ""
    if then == "is killed" and runs[1][1]:
        runs[1][0].go_on(signal.SIGKILL)
    second = runs[1][0].end()
    if broken := between or world.wrong_result():
        return f"before the second {then}: {broken}" if between else broken
    if then == "goes on" and not world.merged.exists():
        return (
            f"both are through, and nothing is published: exit {first.code} {first_line(first)}, {second.code} {first_line(second)}"
        )
    if then == "goes on" and (first.code or second.code):
        return f"published, but exit {first.code} and {second.code}: {first_line(first)} {first_line(second)}"
    for number in range(size):  # what is left is done by the same commands, run again
        again = world.runs.run(rank(number, "--chunk-size", "4096", size=size), world.folder, refuse=LOCAL_FLOCK, constants=cut)
        if broken := world.broken(again, mended=True) if world.merged.exists() or again.code else "":
            return f"run again: {broken}"
    return "" if world.merged.exists() else "run again by all, and nothing is published"


ATTACK = Attack("shared", "F4", "Two ranks may write one file, with the same bytes.", tries)
