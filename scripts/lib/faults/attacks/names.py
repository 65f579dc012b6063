"""F11: hostile names: of shards, of side files, of arguments. What cannot be written is refused
before a byte is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from faults.attacks.world import Attack, Try, World, first_line, misbehavior, rank
from faults.ground import COMMAND, write_checkpoint
from faults.runs import Ended

SHARDS = tuple(f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))
ODD: dict[str, tuple[str, str]] = {
    "a slash and %2F": ("a/b.safetensors", "a%2Fb.safetensors"),
    "a slash and an underscore": ("a/b.safetensors", "a_b.safetensors"),
    "a line break": ("a\nb.safetensors", "b.safetensors"),
    "an escape sequence": ("a\x1b]0;e\x07.safetensors", "b.safetensors"),
    "a direction mark": ("a\u202eb.safetensors", "b.safetensors"),
    "236 bytes": ("x" * 224 + ".safetensors", "b.safetensors"),
    "243 bytes": ("x" * 231 + ".safetensors", "b.safetensors"),
    "255 bytes": ("x" * 243 + ".safetensors", "b.safetensors"),
    "upper and lower case": ("A.safetensors", "a.safetensors"),
    "a dot first": (".hidden.safetensors", "b.safetensors"),
    "a name of a piece": ("m@0-100.safetensors", "m.safetensors"),
    "below pmerge.json": ("pmerge.json/x.safetensors", "b.safetensors"),
    "below the side files": ("chat_templates/x.safetensors", "b.safetensors"),
    "a name that ends with .partial": ("a.partial.safetensors", "a.safetensors"),
}
SIDE_FILES = (
    "pmerge.json",
    "lock",
    "state.json",
    "config.json.partial",
    "model.safetensors.index.json.partial",
    "x" * 240 + ".json",
    "a%2Fb.json",
    "sweep.json",
)
ARGUMENTS = ("ckpt\x1b[31m-1", "--foo\x1b[31m", "ckpt\n-2", "\u202eckpt-3", "x" * 255, "x" * 300, os.fsdecode(b"in\xff"))


def of_shards(world: World) -> Iterator[Try]:
    """Lone, by two ranks, and continued after a kill: published and verified, or refused when it is
    planned.
    """
    for what, names in ODD.items():
        for kind in ("lone", "two ranks", "continued"):
            folder = world.folder / "odd"
            try:
                renamed(folder, names)
            except OSError:
                continue  # this filesystem has no such names
            world.reset()
            command = ("average", "odd", *COMMAND[2:])
            if kind == "continued":
                world.runs.run(command, world.folder, fault="renamedir:1:kill:0:/out")
            ranks = [(*command, *rank(n)[len(COMMAND) :]) for n in (0, 1)]
            runs = [world.runs.run(each, world.folder) for each in (ranks if kind == "two ranks" else [command])]
            yield Try(f"shard with {what}, {kind}", judged(world, runs))
    shutil.rmtree(world.folder / "odd")


def judged(world: World, runs: list[Ended]) -> str:
    for run in runs:
        if wrong := misbehavior(run):
            return wrong
    if all(run.code == 2 for run in runs):
        return "something was written" if world.staging.exists() else ""
    if not world.merged.exists():
        return f"not published, and not refused when planned: exit {runs[-1].code}: {first_line(runs[-1])}"
    verified = world.runs.run(("verify", "out/merged", "--against-inputs", "--sample", "all"), world.folder)
    return "" if verified.code == 0 else f"verify: {first_line(verified)}"


def renamed(folder: Path, names: tuple[str, str]) -> None:
    """Two checkpoints whose two shards have these names."""
    shutil.rmtree(folder, ignore_errors=True)
    for step in (100, 200):
        checkpoint = folder / f"checkpoint-{step}"
        write_checkpoint(checkpoint, step, 300)
        index = json.loads((checkpoint / "model.safetensors.index.json").read_bytes())
        for old, new in zip(SHARDS, names, strict=True):
            (checkpoint / new).parent.mkdir(exist_ok=True)
            (checkpoint / old).rename(checkpoint / new)
        new_names = dict(zip(SHARDS, names, strict=True))
        index["weight_map"] = {tensor: new_names[shard] for tensor, shard in index["weight_map"].items()}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def of_side_files(world: World) -> Iterator[Try]:
    base = world.folder / "in" / "checkpoint-200"
    for name in SIDE_FILES:
        world.reset()
        try:
            (base / name).write_text("{}")
        except OSError:
            continue
        ended = world.runs.run(COMMAND, world.folder)
        (base / name).unlink()
        broken = misbehavior(ended)
        if not broken and ended.code == 0:
            verified = world.runs.run(("verify", "out/merged"), world.folder)
            broken = "" if verified.code == 0 else f"verify: {first_line(verified)}"
        if not broken and ended.code == 1:
            broken = f"fails when it is written, not when it is planned: {first_line(ended)}"
        yield Try(f"side file {name[:40]}", broken)


def of_arguments(world: World) -> Iterator[Try]:
    """Wherever the name is put, no control character reaches the terminal and nothing is written
    elsewhere.
    """
    for name in ARGUMENTS:
        commands = (
            ("average", name, "-o", "out/merged"),
            ("average", "in", "-o", f"out/{name}"),
            ("average", "in", "--method", name, "-o", "out/merged"),
            ("average", "in", "--alpha", name, "-o", "out/merged"),
            ("average", "in", "--rank", name, "--world-size", "2", "-o", "out/merged"),
            ("average", "in", "--last", name, "-o", "out/merged"),
            ("sweep", name, "-o", "out/s", "--method", name),
            ("inspect", name),
            ("verify", name),
            ("finalize", name),
            (name,),
        )
        for command in commands:
            world.reset()
            ended = world.runs.run(command, world.folder)
            broken = misbehavior(ended) or world.touched()
            yield Try(
                f"{command[0][:12]!r} with {name[:20]!r} at {list(command).index(next(w for w in command if name in w))}", broken
            )


def tries(world: World) -> Iterator[Try]:
    for part in (of_shards, of_side_files, of_arguments):
        yield from part(world)


ATTACK = Attack("names", "F11", "A name that cannot be written is refused when planning; no name reaches the terminal raw.", tries)
