"""F11: odd environments: another umask, no permission, a wrong clock, no /proc, the staging folder
on another filesystem.
"""

from __future__ import annotations

from collections.abc import Iterator

from faults.attacks.world import Attack, Try, World, first_line, is_root, misbehavior, rank
from faults.ground import COMMAND, CannotTry
from faults.storage import mounted

NOBODY = 65534
SHARD = "model-00001-of-00002.safetensors"
DAY_S = 86_400


def umasks(world: World) -> Iterator[Try]:
    """A run that its umask locks out of its own files fails; the next one, with a usual umask, goes
    on.
    """
    for umask in (0o077, 0o177, 0o277, 0o777):
        for kind, command in (("lone", COMMAND), ("rank", rank(0))):
            world.reset()
            world.out.chmod(0o777)
            user = NOBODY if is_root() else None
            one = world.runs.run(command, world.folder, user=user, umask=umask)
            two = world.runs.run(command, world.folder, user=user, umask=0o022)
            broken = misbehavior(one) or misbehavior(two)
            if not broken and not world.merged.exists():
                broken = f"the next run exits {two.code}: {first_line(two)}"
            yield Try(f"umask {umask:03o}, {kind}", broken)


def permissions(world: World) -> Iterator[Try]:
    """An input that may not be read is an error of the input: exit 2, and it is named."""
    folder = world.folder / "in" / "checkpoint-200"
    names = ("", SHARD, "config.json", "model.safetensors.index.json", "tokenizer.json", "chat_templates")
    for name in names:
        path = folder / name
        before = path.stat().st_mode
        for mode in (0o000, 0o444, 0o111) if path.is_dir() else (0o000,):
            for command in (COMMAND, ("inspect", "in")):
                world.reset()
                world.out.chmod(0o777)
                path.chmod(mode)
                ended = world.runs.run(command, world.folder, user=NOBODY if is_root() else None)
                path.chmod(before)
                is_needed = command[0] == "average" or name not in ("tokenizer.json", "chat_templates")
                broken = misbehavior(ended)
                if not broken and ended.code not in ((2,) if is_needed else (0, 2)):
                    broken = f"exit {ended.code}: {first_line(ended)}"
                if not broken and ended.code and (name or folder.name) not in ended.stderr:
                    broken = f"not named: {first_line(ended)}"
                yield Try(f"{name or 'the folder'} of an input has mode {mode:03o}, {command[0]}", broken)


def clocks(world: World) -> Iterator[Try]:
    """A rank whose clock is wrong, against the file server's: with --overwrite it must make the
    result again.
    """
    for skew in (3600, -3600, -400 * DAY_S):
        world.reset(overwrite=True)
        runs = [world.runs.run(rank(n, "--overwrite"), world.folder, clock_s=skew if n else 0) for n in (0, 1)]
        yield Try(f"--overwrite, the clock of rank 1 is {skew:+} s off", world.broken(*runs, mended=True))
    for skew in (0, -DAY_S, DAY_S):
        world.reset()
        world.must(world.runs.run(COMMAND, world.folder))
        path = world.merged / SHARD
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        ended = world.runs.run(rank(0, "--overwrite"), world.folder, clock_s=skew)
        yield Try(f"a damaged result, --overwrite by a rank whose clock is {skew:+} s off", world.broken(ended, mended=True))


def without_proc(world: World) -> Iterator[Try]:
    if not is_root():
        return
    for kind, command in (("lone", COMMAND), ("rank", rank(0)), ("verify", ("verify", "old", "--against-inputs"))):
        world.reset()
        ended = world.runs.run(command, world.folder, without_proc=True)
        yield Try(f"no /proc, {kind}", world.broken(ended, mended=True) if kind != "verify" else misbehavior(ended))


def another_filesystem(world: World) -> Iterator[Try]:
    """What is staged could never be renamed: to be noticed before the first byte of the result."""
    for kind, command in (("lone", COMMAND), ("rank", rank(0))):
        world.reset()
        with mounted(world.staging, "-t", "tmpfs", "-o", "size=16m", "tmpfs") as folder:
            ended = world.runs.run(command, world.folder)
            written = [str(path.relative_to(folder)) for path in folder.rglob("*.safetensors*")]
        broken = misbehavior(ended) or (f"all was computed first: {', '.join(written)}" if written else "")
        yield Try(f"the staging folder is on another filesystem, {kind}", broken or ("" if ended.code else "exit 0"))


def tries(world: World) -> Iterator[Try]:
    for part in (umasks, permissions, clocks, without_proc):
        yield from part(world)
    try:
        yield from another_filesystem(world)
    except CannotTry as reason:
        yield Try(f"another filesystem: not tried here ({reason})", "")


ATTACK = Attack("environment", "F11", "An odd environment is an error that names it, and the next run goes on.", tries)
