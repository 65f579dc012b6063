"""F10 and F5: files that do not belong into a result are published with it, or removed with an old
one.

Only what `pmerge.json` lists may be in a result, and only what pmerge wrote is ever removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from faults.attacks.world import PRECIOUS, Attack, Try, World, rank
from faults.ground import COMMAND, FILESYSTEMS
from faults.runs import Ended

SHARD = "model-00001-of-00002.safetensors"
STOPS = ("4:signal:19:/out", "1:signal:19:tool.jinja", "1:signal:19:.index.json")  # the index is the last file that is written


def published(world: World) -> Iterator[Try]:
    yield from from_the_base(world)
    yield from planted(world)
    yield from rewritten(world)


def from_the_base(world: World) -> Iterator[Try]:
    """A side file that an earlier try staged is removed from the base; the next try must not
    publish it.
    """
    base = world.folder / "in" / "checkpoint-200"
    for kind, commands in (("lone", [COMMAND]), ("two ranks", [rank(0), rank(1)]), ("finalize", [("finalize", "out/merged")])):
        for name in ("old_code.py", "chat_templates/old.jinja", "old.json"):
            world.reset()
            (base / name).write_text("{}")
            arguments = () if kind == "lone" else ("--rank", "0", "--world-size", "2")
            world.half_done(*arguments)
            (base / name).unlink()
            runs = [world.runs.run(command, world.folder) for command in commands]
            yield Try(f"{name} staged, then removed from the base, {kind}", world.broken(*runs))


def planted(world: World) -> Iterator[Try]:
    """Somebody puts files into the growing checkpoint, at several moments."""
    names = ("evil.py", "chat_templates/evil.jinja", "deep/er/evil.bin", ".hidden", f"{SHARD}.partial", "checkpoint-1/model.pkl")
    for kind, commands in (("lone", [COMMAND]), ("two ranks", [rank(0), rank(1)])):
        for stop in STOPS if world.thorough else STOPS[1:]:
            for name in names:
                world.reset()
                run = world.runs.start(commands[0], world.folder, fault=f"pwrite:{stop}")
                if run.stops():
                    path = world.staging / "checkpoint" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text("import os")
                runs = [run.end(), *(world.runs.run(command, world.folder) for command in commands[1:])]
                yield Try(f"at {where(stop)}, {name} appears among the staged files, {kind}", world.broken(*runs))


def rewritten(world: World) -> Iterator[Try]:
    """A staged file is changed, cut, exchanged or removed after it was recorded, while the run goes
    on.
    """
    for kind, command in (("lone", COMMAND), ("rank", rank(0))):
        for stop in STOPS if world.thorough else STOPS[1:]:
            for name in (SHARD, "config.json"):
                for how in ("changed", "cut", "exchanged for another file", "removed"):
                    world.reset()
                    run = world.runs.start(command, world.folder, fault=f"pwrite:{stop}")
                    path = world.staging / "checkpoint" / name
                    is_there = run.stops() and path.exists()
                    if is_there:
                        change(path, how)
                    broken = world.broken(run.end())
                    if is_there:
                        yield Try(f"at {where(stop)}, the staged {name} is {how}, {kind}", broken)


def where(stop: str) -> str:
    number, _, _, match = stop.split(":")
    return f"write {number} of {match}"


def change(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "exchanged for another file":
        path.unlink()
        path.write_bytes(bytes(len(content)))
    elif how == "cut":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def replaced(world: World) -> Iterator[Try]:
    """With --overwrite, somebody puts a file into the old result while the run is at work: it must
    not be lost.
    """
    stops = ("pwrite:2", "pwrite:9", "fsync:22", "renamedir:1", "renamedir:2", "unlink:1", "unlink:9")
    for filesystem in ("Linux", "no renameat2 (NFS, Lustre)"):
        for kind, command in (("lone", COMMAND), ("rank", rank(0))):
            for stop in stops if world.thorough else stops[1:5]:
                for name in ("eval_results.json", "chat_templates/notes.txt", "evals/results.json", "model-00003.safetensors"):
                    world.reset(overwrite=True)
                    run = world.runs.start(
                        (*command, "--overwrite"),
                        world.folder,
                        fault=f"{stop}:signal:19:/out",
                        refuse=FILESYSTEMS[filesystem],
                    )
                    is_put = run.stops() and put_into_old(world, name)
                    ended = run.end()
                    if not is_put:
                        continue
                    yield Try(f"at {stop}, {name} is put into the old result, {filesystem}, {kind}", lost(world, name, ended))


def lost(world: World, name: str, ended: Ended) -> str:
    """ "" if the file is in the destination, or in a folder that a failed run left or a successful
    one named.
    """
    kept = [path for path in world.out.rglob(Path(name).name) if path.read_text() == PRECIOUS]
    if not kept:
        return f"exit {ended.code}, and the file is gone"
    is_found = ended.code or world.merged in kept[0].parents or any(str(f.name) in ended.stderr for f in kept[0].parents if f.name)
    return "" if is_found else f"exit 0, and the file is in {kept[0].parent}, which no message names"


def put_into_old(world: World, name: str) -> bool:
    """Put a file into the old result, wherever it is at this moment."""
    for folder in (world.merged, world.staging / "replaced", world.staging / "checkpoint"):
        manifest = folder / "pmerge.json"
        if manifest.is_file() and '"method": "wma"' in manifest.read_text():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(PRECIOUS)
            return True
    return False


ATTACKS = (
    Attack("strangers", "F10", "Only files that pmerge.json lists are published, with the bytes that it records.", published),
    Attack("overwrite", "F5", "--overwrite removes only what pmerge wrote, also what came during the run.", replaced),
)
