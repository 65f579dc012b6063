"""F7: too little of something. A run fails with a message, never with a traceback, and loses
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from faults.attacks.world import Attack, Try, World, is_root, misbehavior, rank
from faults.ground import COMMAND, write_checkpoint
from faults.runs import Ended

NOBODY = 65534
SWEEP = ("sweep", "in", "-o", "out/merged", "--method", "sma,wma,ema:0.1,ema:0.2", "--threads", "2", "--quiet")
COMMANDS: dict[str, tuple[str, ...]] = {
    "average": (*COMMAND, "--threads", "2"),
    "ema": (*COMMAND, "--method", "ema"),
    "rank": rank(0),
    "sweep": SWEEP,
    "verify": ("verify", "old", "--against-inputs", "--sample", "all"),
    "inspect": ("inspect", "in"),
}
ROOMS_MB = (0, 1, 2, 4, 6, 8, 9, 10, 12, 14, 16, 17, 18, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 192)


def memory(world: World) -> Iterator[Try]:
    """ulimit -v, from nothing to enough beyond what is in use at the start; larger tensors than in
    the other attacks.
    """
    for step in (100, 200, 300):
        write_checkpoint(world.folder / "wide" / f"checkpoint-{step}", step, 100_000)
    world.must(world.runs.run(("average", "wide", "-o", "wide-average", "--quiet"), world.folder))
    wide = {"in": "wide", "old": "wide-average"}
    for what, command in COMMANDS.items():
        for room in ROOMS_MB if world.thorough else ROOMS_MB[::4]:
            world.reset()
            ended = world.runs.run([wide.get(word, word) for word in command], world.folder, room=room << 20, timeout_s=20)
            yield Try(f"ulimit -v, {room} MB beyond the start, {what}", misbehavior(ended) or world.touched())


def threads(world: World) -> Iterator[Try]:
    """No new thread (ulimit -u, a pids limit)."""
    for what, command in COMMANDS.items():
        world.reset()
        world.out.chmod(0o777)
        ended = world.runs.run(command, world.folder, limits={"RLIMIT_NPROC": 0}, user=NOBODY if is_root() else None)
        yield Try(f"no new thread, {what}", behaved(world, what, ended))


def descriptors(world: World) -> Iterator[Try]:
    for what, command in COMMANDS.items():
        for limit in (6, 8, 10, 12, 16, 24, 40, 64):
            world.reset()
            ended = world.runs.run(command, world.folder, limits={"RLIMIT_NOFILE": limit})
            yield Try(f"ulimit -n {limit}, {what}", behaved(world, what, ended))


def streams(world: World) -> Iterator[Try]:
    """stdout and stderr closed, on a full disk, or a pipe that nobody reads: the result is not the
    worse for it.
    """
    for how in ("closed", "full", "broken"):
        for command in (COMMAND[:-1], rank(0)[:-1]):
            world.reset()
            ended = world.runs.run(command, world.folder, streams={"stdout": how, "stderr": how})
            broken = world.wrong_result() or ("" if world.merged.exists() or ended.code else "exit 0, and nothing is published")
            yield Try(f"stdout and stderr {how}, {len(command)} words", broken or ("hangs" if ended.hung else ""))


def behaved(world: World, what: str, ended: Ended) -> str:
    if what in ("average", "rank"):
        return world.broken(ended)
    return misbehavior(ended) or world.touched()


def tries(world: World) -> Iterator[Try]:
    for part in (memory, threads, descriptors, streams):
        yield from part(world)


ATTACK = Attack("limits", "F7", "Too little memory, threads, descriptors or output is an error with a message.", tries)
