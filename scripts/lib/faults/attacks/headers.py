"""F8: checkpoints whose headers alone are hundreds of MB: memory must be bounded by a limit that is
an error, not by luck.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from faults.attacks.world import Attack, Try, World, first_line, misbehavior
from faults.ground import COMMAND

LIMIT = 1 << 30
TENSORS = 200_000  # empty ones: 12 MB of header a shard
SHARDS = 8


def write(folder: Path, shards: int) -> None:
    """A checkpoint of `shards` files that hold nothing but names, and without an index, which would
    be too large.
    """
    folder.mkdir(parents=True)
    entry = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    for shard in range(shards):
        tensors = {f"{shard}.{number}": entry for number in range(TENSORS)}
        header = json.dumps({"__metadata__": {"of": folder.name}, **tensors}, separators=(",", ":")).encode()
        (folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def tries(world: World) -> Iterator[Try]:
    for step in (1, 2):
        write(world.folder / "large" / f"checkpoint-{step}", SHARDS)
    for command in (("inspect", "large"), ("average", "large", *COMMAND[2:], "--dry-run"))[: 2 if world.thorough else 1]:
        world.reset()
        ended = world.runs.run(command, world.folder, timeout_s=300, room=4 << 30)
        broken = misbehavior(ended)
        if not broken and ended.peak_bytes > LIMIT:
            broken = f"takes {ended.peak_bytes >> 20} MiB: exit {ended.code}: {first_line(ended)}"
        yield Try(f"2 checkpoints of {SHARDS} shards with {TENSORS:,} names each, {command[0]}", broken)


ATTACK = Attack(
    "headers", "F8", "The headers of all checkpoints together are bounded, or the run says which limit to raise.", tries
)
