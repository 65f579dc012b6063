"""F1: links planted in the staging folder, by whoever may create it beside the destination (/tmp,
shared scratch).

Nothing may be written, truncated or removed behind them, and no result may be or hold a link. Links
above the staging folder are honest: clusters have them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

from faults.attacks.world import Attack, Try, World, rank, remove
from faults.ground import COMMAND

SHARD = "model-00001-of-00002.safetensors"
FOLDERS = ("", "checkpoint", "done", "claims", "ranks", "replaced", "checkpoint/chat_templates")
FILES = (
    "lock",
    "lock.owner",
    "lock.takeover",
    "control",
    "control.owner",
    "state.json",
    "state.json.partial",
    "publish.json",
    "publish.json.partial",
    f"done/{SHARD}.json",
    f"done/{SHARD}.json.partial",
    f"claims/{SHARD}",
    "ranks/0",
    "ranks/world_size",
    "ranks/world_size.partial",
    f"checkpoint/{SHARD}",
    f"checkpoint/{SHARD}.partial",
    "checkpoint/config.json",
    "checkpoint/config.json.partial",
    "checkpoint/pmerge.json.partial",
    "checkpoint/model.safetensors.index.json.partial",
    "checkpoint/chat_templates/tool.jinja.partial",
)
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lone": (COMMAND,),
    "--restart": ((*COMMAND, "--restart"),),
    "--overwrite": ((*COMMAND, "--overwrite"),),
    "two ranks": (rank(0), rank(1)),
    "finalize": (("finalize", "out/merged"),),
}


def planted_before(world: World) -> Iterator[Try]:
    """A link at each name that pmerge uses, in a staging folder made for the purpose or left by a
    killed run.
    """
    for left in ("made by another", "left by a run"):
        for name in (*FOLDERS, *FILES):
            for kind, commands in COMMANDS.items():
                if left == "left by a run" and (kind == "--restart" or not name):
                    continue
                prepare(world, left, kind, bare=not name)
                plant(world, name)
                runs = [world.runs.run(command, world.folder, timeout_s=10) for command in commands]
                yield Try(f"{left}, {name or 'the folder'} is a link, {kind}", world.broken(*runs))


def hard_links(world: World) -> Iterator[Try]:
    """A second name of a file of the user: its owner is the right one, and it is no link to lstat."""
    for left in ("made by another", "left by a run"):
        for name in FILES:
            for kind in ("lone", "two ranks"):
                prepare(world, left, kind)
                path = world.staging / name
                remove(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.hardlink_to(world.victim / "precious.txt")
                runs = [world.runs.run(command, world.folder, timeout_s=10) for command in COMMANDS[kind]]
                yield Try(f"{left}, {name} is a second name of a file, {kind}", world.broken(*runs))


def of_another_user(world: World) -> Iterator[Try]:
    """Real folders and files, but those of another user: he may change them at any moment, also
    after they were looked at.
    """
    if os.geteuid():
        return
    for name in ("", "checkpoint", "done", f"checkpoint/{SHARD}"):
        for kind in ("lone", "two ranks", "finalize"):
            prepare(world, "left by a run", kind)
            os.chown(world.staging / name, 65534, 65534)
            runs = [world.runs.run(command, world.folder) for command in COMMANDS[kind]]
            broken = world.broken(*runs)
            if name != f"checkpoint/{SHARD}" and runs[0].code == 0:
                broken = broken or "exit 0: works in it"
            if any(path.stat().st_uid for path in world.merged.rglob("*")):
                broken = broken or "published, and still the other user's"
            yield Try(f"{name or 'the folder'} belongs to another user, {kind}", broken)


def prepare(world: World, left: str, kind: str, bare: bool = False) -> None:
    """A staging folder "left by a run" that was killed, or one "made by another", which may be
    `bare`.
    """
    world.reset()
    if left == "left by a run":
        world.half_done(*(("--rank", "0", "--world-size", "2") if kind in ("two ranks", "finalize") else ()))
    elif not bare:
        world.staging.mkdir()
        (world.staging / "state.json").write_text("{}")


def planted_during(world: World) -> Iterator[Try]:
    """The same while a run stands still: a folder or a file that it uses is exchanged for a link."""
    for stop in ("4:signal:19:/out", "7:signal:19:/out", "1:signal:19:.index.json") if world.thorough else ("7:signal:19:/out",):
        for name in (*FOLDERS, "lock", f"checkpoint/{SHARD}", f"done/{SHARD}.json"):
            world.reset()
            run = world.runs.start(COMMAND, world.folder, fault=f"pwrite:{stop}")
            if run.stops():
                plant(world, name)
            ended = run.end()
            yield Try(f"at write {stop.partition(':')[0]}, {name or 'the folder'} becomes a link", world.broken(ended))


def at_the_destination(world: World) -> Iterator[Try]:
    """The destination itself becomes a link between the check and the use."""
    for arguments in ((), ("--overwrite",)):
        for stop in ("pwrite:4", "renamedir:1"):
            world.reset(overwrite=bool(arguments))
            run = world.runs.start((*COMMAND, *arguments), world.folder, fault=f"{stop}:signal:19:/out")
            if run.stops():
                exchanged(world)
            ended = run.end()
            broken = "exit 0, and the result is a link" if world.merged.is_symlink() and ended.code == 0 else world.touched()
            yield Try(f"at {stop}, the destination becomes a link {' '.join(arguments)}", broken)


def honest(world: World) -> Iterator[Try]:
    """No attack: a link above the destination, as clusters have them, is followed."""
    for name, commands in (("lone", (COMMAND,)), ("two ranks", (rank(0), rank(1)))):
        world.reset()
        real = world.folder / "real"
        shutil.rmtree(real, ignore_errors=True)
        real.mkdir()
        world.out.rmdir()
        world.out.symlink_to(real)
        runs = [world.runs.run(command, world.folder) for command in commands]
        yield Try(f"the folder above is a link, {name}", world.broken(*runs, mended=True))
        world.out.unlink()
        world.out.mkdir()


def plant(world: World, name: str) -> None:
    """Make `name` in the staging folder a link to the victim's folder, or to a file of his."""
    path = world.staging / name if name else world.staging
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(world.victim if name in FOLDERS else world.victim / "precious.txt")


def exchanged(world: World) -> None:
    remove(world.merged)
    world.merged.symlink_to(world.victim)


def tries(world: World) -> Iterator[Try]:
    parts: tuple[Callable[[World], Iterator[Try]], ...] = (
        planted_before,
        hard_links,
        of_another_user,
        planted_during,
        at_the_destination,
        honest,
    )
    for part in parts:
        yield from part(world)


ATTACK = Attack("links", "F1", "Nothing outside the staging folder is written, removed or published.", tries)
