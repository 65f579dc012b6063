"""Python's part of a chunk: CPU time of the real loop with reading, sums, hashing and writing
replaced by nothing, beside that of the loop as it is.

    PYTHONPATH=scripts/lib .venv/bin/python -m bench.python_part CHECKPOINT... [--chunk-sizes LIST]

One thread, an average of plain tensors by the native kernel. While Python is at work no other
thread can be, so the inverse of its share is the number of threads that can be kept busy. Each size
is measured in rounds, both ways in turn; printed are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from merge_cli.engine import writer
from merge_cli.engine.kernels import native
from merge_cli.features.average import plan_average, run_average
from merge_cli.stores.local import LocalSource
from merge_cli.system import durable

SMALL_BYTES = 128 << 10  # a header; chunks are larger


def nothing(*_: object) -> None:
    """In place of work."""


@contextmanager
def without_work() -> Iterator[None]:
    """The loop reads, sums, hashes and writes nothing."""
    real: Callable[..., None] = native.Kernel.__init__
    read: Callable[..., None] = LocalSource.read_into

    def idle(kernel: Any, *given: Any) -> None:
        real(kernel, *given)
        kernel.call = nothing

    def read_headers(source: LocalSource, offset: int, buffer: memoryview) -> None:
        if len(buffer) < SMALL_BYTES:
            read(source, offset, buffer)

    write: Callable[..., None] = durable.write_all

    def write_headers(fd: int, data: memoryview, *given: Any) -> None:
        if len(data) < SMALL_BYTES:
            write(fd, data, *given)

    with ExitStack() as stack:
        for owner, name, instead in (
            (LocalSource, "read_into", read_headers),
            (native.Kernel, "__init__", idle),
            (writer, "write_all", write_headers),
            (writer, "reserve", lambda fd, size, _: os.truncate(fd, size)),
            (writer, "_hash_range", nothing),
            (writer._FrontHash, "update", nothing),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def microseconds(checkpoints: list[str], out: Path, chunk_size: str, around: AbstractContextManager[None]) -> float:
    """CPU time of a chunk within `around`."""
    plan = plan_average(checkpoints, out, chunk_size=chunk_size, threads=1, device="cpu", direct="off", memory="4GiB")
    with around:
        began = time.process_time()
        result = run_average(plan)
    return 1e6 * (time.process_time() - began) / result.statistics.chunks


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench.python_part", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--chunk-sizes", default="512KiB,1MiB,2MiB,4MiB")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    print(f"{'chunk':>8} {'whole us':>9} {'Python us':>9} {'share':>7}")
    for chunk_size in options.chunk_sizes.split(","):
        whole, python = [], []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory(dir=Path(options.checkpoints[0]).parent) as folder:
                whole.append(microseconds(options.checkpoints, Path(folder) / "whole", chunk_size, nullcontext()))
                python.append(microseconds(options.checkpoints, Path(folder) / "python", chunk_size, without_work()))
        shares = [b / a for a, b in zip(whole, python, strict=True)]
        print(f"{chunk_size:>8} {statistics.median(whole):9.0f} {statistics.median(python):9.0f} {statistics.median(shares):7.1%}")


if __name__ == "__main__":
    main()
