"""Decide whether inputs are read with O_DIRECT. Reads up to 128 MiB of one input to time both ways.

O_DIRECT saves the copy through the page cache, but loses its readahead; which of the two is faster
differs from machine to machine, so it is timed, and only where the inputs are too large to stay in
the cache anyway.
"""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

from merge_cli.engine.storage import LARGE_REQUEST_BYTES, is_larger_than_cache
from merge_cli.errors import UsageError
from merge_cli.planning.plan import MergePlan
from merge_cli.stores.local import DIRECT_BLOCK_BYTES, LocalSource

SAMPLE_BYTES = 64 << 20
_SAMPLE_THREADS = 4
_WORTHWHILE = 1.1


class Direct(NamedTuple):
    """Whether to read with O_DIRECT, and a line that says why ("" where nobody asked)."""

    use: bool
    note: str


def choose_direct(plan: MergePlan, setting: str) -> Direct:
    """Decide about O_DIRECT for `setting` "auto", "on" or "off". Raises UsageError for another one.

    "auto" times both ways on the first bytes of the largest file, and wants a gain of a tenth.
    Where O_DIRECT cannot be had, reads are buffered whatever was asked.
    """
    if setting not in ("auto", "on", "off"):
        raise UsageError(f"--direct cannot be {setting!r}", details=["expected  auto, on, off"], hint="--direct auto")
    files = [max(checkpoint.files, key=lambda file: file.file_bytes) for checkpoint in plan.inputs if checkpoint.files]
    if setting == "off" or not files or (setting == "auto" and not is_larger_than_cache(plan)):
        return Direct(False, "")
    sources = [file.source for file in files if isinstance(file.source, LocalSource)]
    if len(sources) < len(files):
        return Direct(False, "inputs are not all on this machine, so O_DIRECT is not used" if setting == "on" else "")
    for source in sources:
        try:
            _probe(source)
        except OSError as error:
            return Direct(False, f"inputs are read through the page cache: O_DIRECT fails for {source.path}: {error.strerror}")
    if setting == "on":
        return Direct(True, "")
    largest = max(sources, key=lambda source: source.num_bytes)
    size = min(SAMPLE_BYTES, largest.num_bytes // 2)
    try:
        direct, buffered = _bytes_per_s(largest, 0, size, os.O_DIRECT), _bytes_per_s(largest, size, size, 0)
    except OSError as error:
        return Direct(False, f"inputs are read through the page cache: O_DIRECT fails for {largest.path}: {error.strerror}")
    use = direct >= _WORTHWHILE * buffered
    way = "with O_DIRECT" if use else "through the page cache"
    figures = f"{direct / 1e9:.2f} GB/s with O_DIRECT, {buffered / 1e9:.2f} GB/s without"
    return Direct(use, f"inputs are read {way}: the first {2 * size >> 20} MiB gave {figures} (--direct)")


def _probe(source: LocalSource) -> None:
    with closing(source):
        os.preadv(source.descriptor(os.O_DIRECT), [mmap.mmap(-1, DIRECT_BLOCK_BYTES)], 0)


def _bytes_per_s(source: LocalSource, begin: int, size: int, flags: int) -> float:
    """Time `size` bytes from `begin`, read by several threads; what the page cache holds of them is
    dropped first.
    """
    request, begin = LARGE_REQUEST_BYTES, begin // LARGE_REQUEST_BYTES * LARGE_REQUEST_BYTES
    with closing(source):
        fd = source.descriptor(flags)
        os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(_SAMPLE_THREADS) as pool:
            buffers = [mmap.mmap(-1, request) for _ in range(_SAMPLE_THREADS)]

            def read(lane: int) -> int:
                starts = range(begin + lane * request, begin + size, _SAMPLE_THREADS * request)
                return sum(os.preadv(fd, [buffers[lane]], start) for start in starts)

            began = time.perf_counter()
            done = sum(pool.map(read, range(_SAMPLE_THREADS)))
        return max(done, 1) / max(time.perf_counter() - began, 1e-9)
