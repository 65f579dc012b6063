"""F2: the staging folder of a run is removed, as an impatient user does with that of a hung node,
and another run begins.

The first run goes on when it comes back. It may only fail; the second one publishes its own result.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from faults.attacks.world import Attack, Try, World, first_line, rank
from faults.ground import COMMAND


def tries(world: World) -> Iterator[Try]:
    yield from removed(world)
    kinds = {"a run": COMMAND, "a rank": rank(0)}
    for one in kinds:
        for other in kinds:
            steps = (4, 5) if not world.thorough else (1, 2) if one == other == "a run" else (3, 3)
            for first_stop in range(2, 15, steps[0]):
                for second_stop in range(1, 15, steps[1]):
                    what = f"{one} stopped at write {first_stop}, removed, {other} by wma stopped at write {second_stop}"
                    yield Try(what, overtaken(world, kinds[one], kinds[other], first_stop, second_stop))


def removed(world: World) -> Iterator[Try]:
    """No second run: the first one fails, and publishes nothing."""
    for stop in ("pwrite:2", "pwrite:5", "rename:6", "fsync:20", "renamedir:1"):
        world.reset()
        run = world.runs.start(COMMAND, world.folder, fault=f"{stop}:signal:19:/out")
        if run.stops():
            shutil.rmtree(world.staging)
        yield Try(f"removed at {stop}", world.broken(run.end()))


def overtaken(world: World, one: tuple[str, ...], other: tuple[str, ...], first_stop: int, second_stop: int) -> str:
    """A run by sma stops, its folder is removed, a run by wma stops, and both go on one after the
    other.
    """
    world.reset()
    first = world.runs.start(one, world.folder, fault=f"pwrite:{first_stop}:signal:19:/out")
    has_stopped = first.stops()
    shutil.rmtree(world.staging, ignore_errors=True)
    second = world.others.start((*other, "--method", "wma"), world.folder, fault=f"pwrite:{second_stop}:signal:19:/out")
    second.stops()
    ended = [first.end()]
    between = world.wrong_result((world.expected, world.old))
    ended.append(second.end())
    if not has_stopped:
        return world.broken(*ended)
    if broken := world.broken(*ended, right=(world.expected, world.old)):
        return broken
    if ended[0].code == 0 and not world.wrong_result((world.old,)):
        return "exit 0 of the first, and the result of the second"
    if ended[1].code:
        return f"the second, whose folder nobody removed, exits {ended[1].code}: {first_line(ended[1])}"
    return f"for a time {between}" if between else ""


ATTACK = Attack("removed", "F2", "A run whose staging folder is gone publishes nothing, and disturbs no other run.", tries)
