"""Write synthetic checkpoints `ckpt_1000`, `ckpt_2000`, ...: real names, headers and config,
made-up weights.

    scripts/make_checkpoints --shape dense --size 1.7GB --count 4 --out /dev/shm/run
    scripts/make_checkpoints --shape moe --size 1.7GB --tensors 20000 --count 4 --out /dev/shm/run
    scripts/make_checkpoints --shape deepseek-v3 --count 8 --sparse --out /dev/shm/run

Weights look like N(0, 0.02), and those of one checkpoint differ a little from the next's. They are
cut from one random block for each checkpoint, at a place that depends on the tensor's name: fast,
finite, and the same on every run. `--sparse` writes the headers and leaves the data as holes, which
read as zeros: 8 checkpoints of 671B parameters take no disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from checkpoints.shapes import PUBLISHED, SHAPES, Tensor, split_into_shards
from units import format_size, parse_size

BLOCK_ELEMENTS = 8_000_009  # small enough for a cache; prime, so that repeats do not line up with rows


def random_blocks(step: int) -> dict[str, memoryview]:
    """Random bytes for each dtype. A shared base and a little of the step's own noise; no NaN, no
    Inf.
    """
    import torch

    base = torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0))
    own = torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(step))
    values = base + own * 0.02
    blocks = {
        "F32": 2e-4 * (1 + 0.1 * values.clamp(-5, 5)),  # scales: positive
        "BF16": (0.02 * values).bfloat16(),
        "F8_E4M3": (110 * values).clamp(-448, 448).to(torch.float8_e4m3fn),
    }
    return {dtype: block.view(torch.uint8).numpy().data for dtype, block in blocks.items()}


def pieces(block: memoryview, tensor: Tensor) -> Iterator[memoryview]:
    """`tensor`'s bytes as slices of `block`, which starts over as often as it takes."""
    item = len(block) // BLOCK_ELEMENTS
    start = zlib.crc32(tensor.name.encode()) % BLOCK_ELEMENTS * item
    left = tensor.nbytes
    while left:
        piece = block[start : start + left]
        yield piece
        left -= len(piece)
        start = 0


def safetensors_header(tensors: list[Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, header: bytes, tensors: list[Tensor], blocks: dict[str, memoryview] | None) -> None:
    with path.open("wb") as file:
        file.write(header)
        if blocks is None:
            file.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))
            return
        for tensor in tensors:
            for piece in pieces(blocks[tensor.dtype], tensor):
                file.write(piece)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/make_checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="dense")
    parser.add_argument("--size", type=parse_size, default=parse_size("1.7GB"), help="of one checkpoint")
    parser.add_argument("--shards", type=int, default=0, help="default: 3, or as published")
    parser.add_argument("--count", type=int, default=4, help="number of checkpoints")
    parser.add_argument("--tensors", type=int, default=0, help="about so many in one checkpoint")
    parser.add_argument("--largest-tensor", type=parse_size, default=0, metavar="SIZE", help="its embedding")
    parser.add_argument("--sparse", action="store_true", help="headers only; the data are holes, all zeros")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the checkpoints")
    options = parser.parse_args(argv)
    if options.count < 1 or options.shards < 0:
        parser.error("--count and --shards must be positive")
    if options.shape in PUBLISHED and (options.tensors or options.largest_tensor):
        parser.error(f"--shape {options.shape} has its published sizes: leave out --tensors and --largest-tensor")
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    try:
        made = SHAPES[options.shape](options.size, options.tensors, options.largest_tensor)
    except ValueError as error:
        sys.exit(f"error: {error}")
    folders = [options.out / f"ckpt_{1000 * (i + 1)}" for i in range(options.count)]
    if existing := [folder for folder in folders if folder.exists()]:
        sys.exit(f"error: {existing[0]} exists already")
    shards = split_into_shards(made.tensors, options.shards or made.num_shards)
    total_bytes = sum(tensor.nbytes for tensor in made.tensors)
    options.out.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(options.out).free
    if not options.sparse and options.count * total_bytes > free_bytes:
        need = format_size(options.count * total_bytes)
        sys.exit(
            f"error: {options.out} has {format_size(free_bytes)} free, the checkpoints need {need}\n"
            "hint: a smaller --size or --count, or headers alone with --sparse"
        )

    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    headers = [safetensors_header(shard) for shard in shards]
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    texts = {
        "config.json": json.dumps(made.config, indent=2) + "\n",
        "model.safetensors.index.json": json.dumps(index, indent=2, sort_keys=True) + "\n",
    }
    for step, folder in enumerate(folders, start=1):
        folder.mkdir()
        blocks = None if options.sparse else random_blocks(step)
        for name, header, shard in zip(names, headers, shards, strict=True):
            write_shard(folder / name, header, shard, blocks)
        for name, text in texts.items():
            (folder / name).write_text(text)
        print(folder)
    largest = format_size(max(tensor.nbytes for tensor in made.tensors))
    print(
        f"{options.count} checkpoints of {format_size(total_bytes)}: {len(made.tensors)} tensors,"
        f" the largest {largest}, in {len(shards)} shards",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
