"""F6 and F7: where a file is expected lies something else: a FIFO, a socket, a device, a folder, a
link, JSON of another shape.

No hang, no traceback, bounded memory, wherever it lies: in an input, in the staging folder, at the
destination, beside a sweep.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from faults.attacks.world import Attack, Try, World, misbehavior, rank, remove
from faults.ground import COMMAND

SHARD = "model-00001-of-00002.safetensors"
SWEEP = ("sweep", "in", "-o", "out/s", "--method", "sma,wma", "--threads", "1", "--quiet")
PEAK = 1 << 30


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    folder = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(folder)


def device(path: Path) -> None:
    if os.geteuid() == 0:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # as /dev/zero: it never ends
    else:
        path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    (path / "with").mkdir(parents=True)


def dead_link(path: Path) -> None:
    path.symlink_to("/nonexistent/anything")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode("utf-8", "surrogatepass"))


KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": fifo,
    "a socket": unix_socket,
    "a device": device,
    "a folder": folder,
    "a dead link": dead_link,
    "a link to itself": loop,
    "JSON 200,000 deep": text("[" * 200_000 + "]" * 200_000),
    "an object 200,000 deep": text('{"state":' * 200_000 + "1" + "}" * 200_000),
    "a list": text("[1]"),
    "null": text("null"),
    "a number with 5,000 digits": text("1" * 5000),
    "a lone surrogate": text('{"state": "\ud800", "\ud800": {"host": "\\ud800"}}'),
    "nothing": text(""),
}
QUICK = ("a FIFO", "a dead link", "JSON 200,000 deep", "a list")

INPUT = ("config.json", "model.safetensors.index.json", "trainer_state.json", SHARD, "tokenizer.json", "chat_templates/tool.jinja")
STAGED = (
    "state.json",
    "publish.json",
    "lock",
    "lock.owner",
    "control",
    "control.owner",
    f"done/{SHARD}.json",
    f"checkpoint/{SHARD}",
    f"checkpoint/{SHARD}.partial",
    "checkpoint/config.json",
    "ranks/world_size",
    "ranks/1-of-2.json",
    f"claims/{SHARD}",
)
DESTINATION: dict[str, tuple[str, ...]] = {
    "average --overwrite": (*COMMAND, "--overwrite"),
    "rank": rank(0),
    "rank --overwrite": rank(0, "--overwrite"),
    "verify": ("verify", "out/merged", "--against-inputs"),
    "finalize": ("finalize", "out/merged"),
    "inspect": ("inspect", "out/merged"),
}


def kinds(world: World) -> Sequence[str]:
    return tuple(KINDS) if world.thorough else QUICK


def put(path: Path, kind: str) -> None:
    """Put something odd in place of whatever is there."""
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    KINDS[kind](path)


def tried(world: World, what: str, *commands: Sequence[str]) -> Try:
    """Run the commands: all promises hold, and memory is bounded."""
    runs = [world.runs.run(command, world.folder, timeout_s=10, room=3 << 30) for command in commands]
    large = max(run.peak_bytes for run in runs)
    broken = world.broken(*runs)
    return Try(what, broken or (f"takes {large >> 20} MiB" if large > PEAK else ""))


def in_an_input(world: World) -> Iterator[Try]:
    aside = world.folder / "aside"
    for name in INPUT:
        path = world.folder / "in" / "checkpoint-200" / name
        for kind in kinds(world):
            for command in (COMMAND, ("inspect", "in")):
                world.reset()
                if is_there := path.exists():
                    path.rename(aside)
                put(path, kind)
                yield Try(f"{name} of an input is {kind}, {command[0]}", behaves(world, command))
                remove(path)
                if is_there:
                    aside.rename(path)


def behaves(world: World, command: Sequence[str]) -> str:
    """ "" if the run behaves and its memory is bounded; what it makes is not looked at, and is
    removed.
    """
    ended = world.runs.run(command, world.folder, timeout_s=10, room=3 << 30)
    large = f"takes {ended.peak_bytes >> 20} MiB" if ended.peak_bytes > PEAK else ""
    return misbehavior(ended) or world.touched() or large


def in_the_staging_folder(world: World) -> Iterator[Try]:
    runs: dict[str, tuple[tuple[str, ...], ...]] = {
        "lone": (COMMAND,),
        "two ranks": (rank(0), rank(1)),
        "finalize": (("finalize", "out/merged"),),
    }
    for name in STAGED:
        for kind in kinds(world):
            for how, commands in runs.items() if kind in (*QUICK, "a device") else [("lone", (COMMAND,))]:
                world.reset()
                world.half_done(*(() if how == "lone" else ("--rank", "0", "--world-size", "2")))
                put(world.staging / name, kind)
                yield tried(world, f"{name} is {kind}, {how}", *commands)


def at_the_destination(world: World) -> Iterator[Try]:
    for kind in kinds(world):
        for what, command in DESTINATION.items():
            for name in ("pmerge.json", ""):
                world.reset(overwrite=bool(name))
                put(world.merged / name if name else world.merged, kind)
                yield Try(f"{name or 'the destination'} is {kind}, {what}", behaves(world, command))


def at_a_sweep(world: World) -> Iterator[Try]:
    for name in ("sweep.json", "sma/pmerge.json", "sma", "sma.pmerge-partial/state.json", "sma.pmerge-partial/lock"):
        for kind in kinds(world):
            world.reset()
            put(world.out / "s" / name, kind)
            yield Try(f"{name} of a sweep is {kind}", behaves(world, SWEEP))
    for kind in kinds(world):
        if kind in ("a FIFO", "a device"):
            continue  # a list may come from a pipe
        world.reset()
        put(world.out / "list.json", kind)
        yield Try(f"the --list is {kind}", behaves(world, (*SWEEP[:4], "--list", "out/list.json", "--quiet")))


def tries(world: World) -> Iterator[Try]:
    for part in (in_an_input, in_the_staging_folder, at_the_destination, at_a_sweep):
        yield from part(world)


def quantization_sections(world: World) -> Iterator[Try]:
    """Any JSON where another type is expected in the quantization section of config.json."""
    path = world.folder / "in" / "checkpoint-200" / "config.json"
    odd: tuple[object, ...] = (True, 3, "x", [], [[]], None, {"a": 1}, float("inf"), -1, 10**400)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}
    shapes: dict[str, Callable[[object], object]] = {
        "the section": lambda value: value,
        "quant_method": lambda value: {"quant_method": value},
        "config_groups": lambda value: {"quant_method": "compressed-tensors", "config_groups": value},
        "a group": lambda value: {"quant_method": "compressed-tensors", "config_groups": {"group_0": value}},
        "targets": lambda value: ct({**group, "targets": value}),
        "weights": lambda value: ct({**group, "weights": value}),
        "num_bits": lambda value: ct({**group, "weights": {"num_bits": value, "type": "int"}}),
        "group_size": lambda value: ct({**group, "weights": {"num_bits": 4, "type": "int", "group_size": value}}),
        "format": lambda value: {**ct(group), "format": value},
        "ignore": lambda value: {**ct(group), "ignore": value},
        "weight_block_size": lambda value: {"quant_method": "fp8", "weight_block_size": value},
        "a block's side": lambda value: {"quant_method": "fp8", "weight_block_size": [128, value]},
        "modules_to_not_convert": lambda value: {"quant_method": "mxfp4", "modules_to_not_convert": value},
    }
    before = path.read_bytes()
    for what, shape in shapes.items():
        for value in odd:
            world.reset()
            path.write_text(json.dumps({"model_type": "llama", "quantization_config": shape(value)}))
            for command in (COMMAND, ("inspect", "in")):
                yield Try(f"{what} is {str(value)[:20]}, {command[0]}", behaves(world, command))
    path.write_bytes(before)


def ct(group: object) -> dict[str, object]:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


ATTACKS = (
    Attack("odd-files", "F6", "No hang, no traceback, bounded memory, whatever lies where a file is expected.", tries),
    Attack("odd-config", "F7", "No traceback, whatever JSON the quantization section of a config holds.", quantization_sections),
)
