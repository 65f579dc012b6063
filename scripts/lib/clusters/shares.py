"""What the shares of ranks look like for very large checkpoints, from the algorithm itself; no file
is made.

    scripts/simulate_shares                               1T parameters in bf16, 8 checkpoints, shards as published, 1 to 512 ranks
    scripts/simulate_shares --storage 40GB --node 5GB     bandwidth of the storage in all, and of one rank

A table: pieces, the largest share over the mean, files that a rank opens (at most: its pieces'
files, of every input and of the output), what is read once more for the sha256 of files that are
cut, and the time. The time of a rank is its share, of every input and of the output, over the least
of its own bandwidth and its part of the storage's; the slowest rank decides. What taking over from
each other would save is left out.
"""

from __future__ import annotations

import argparse
import random

from merge_cli.planning.plan import OutputFile
from merge_cli.ranks.shares import cut, shares
from units import parse_size

SHARDS = (163, 430, 1000, 1500)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOTAL = 2_000_000_000_000


def files_of(shards: int, seed: int = 0) -> list[OutputFile]:
    """`shards` files of 2 TB: nearly even, the last one half as large, as limits on the size of a
    shard leave them.
    """
    numbers = random.Random(seed)
    weights = [numbers.uniform(0.97, 1.0) for _ in range(shards - 1)] + [0.5]
    return [OutputFile(f"{i:05d}", b"", int(TOTAL * weight / sum(weights)), (), ()) for i, weight in enumerate(weights)]


def simulate(files: list[OutputFile], ranks: int, inputs: int, storage: float, node: float) -> dict[str, float]:
    """The figures of one row; `storage` and `node` in bytes a second."""
    pieces = cut(files, ranks)
    found = shares(pieces, ranks)
    loads = [sum(piece.end - piece.begin for piece in share) for share in found]
    touched = [len({piece.file.name for piece in share}) * (inputs + 1) for share in found]
    again = sum(piece.end - piece.begin for piece in pieces if not piece.is_whole)
    rate = min(node, storage / ranks)
    seconds = max(load * (inputs + 1) / rate for load in loads) + again / min(ranks * node, storage)
    return {
        "pieces": len(pieces),
        "largest": max(loads) * ranks / sum(loads),
        "files": max(touched),
        "again": again / TOTAL,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        "scripts/simulate_shares", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", default="40GB", help="bytes a second of all ranks together")
    parser.add_argument("--node", default="3GB", help="bytes a second of one rank")
    parser.add_argument("--inputs", type=int, default=8)
    options = parser.parse_args()
    storage, node = parse_size(options.storage), parse_size(options.node)
    print("| shards | ranks | pieces | largest share / mean | files a rank opens | read again | time |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for shards in SHARDS:
        files = files_of(shards)
        for ranks in RANKS:
            row = simulate(files, ranks, options.inputs, storage, node)
            print(
                f"| {shards} | {ranks} | {row['pieces']:.0f} | {row['largest']:.3f} | {row['files']:.0f} |"
                f" {row['again']:.0%} | {row['seconds'] / 60:.1f} min |"
            )


if __name__ == "__main__":
    main()
