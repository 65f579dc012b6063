"""What is known of the storage that inputs lie on, and how it is best read: in which requests, and past the page cache or not.

Network filesystems want few large requests; data that is local, or in the page cache, is best taken in pieces that are still in the
processor's cache when they are added up. O_DIRECT saves the copy through the page cache, but loses its readahead; which of the two
is faster differs from machine to machine, so it is timed, and only where the inputs are too large to stay in the cache anyway.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from merge_cli.errors import UsageError
from merge_cli.formats.checkpoint import WeightFile
from merge_cli.plan import MergePlan

LARGE_REQUEST_BYTES = 4 << 20
DIRECT_BLOCK_BYTES = 4096
CACHED_SHARE = 0.25  # of the memory: larger inputs are not left in the page cache
SAMPLE_BYTES = 64 << 20
_SAMPLE_THREADS = 4
_WORTHWHILE = 1.1
_LOCAL = {  # linux/magic.h; what is not here may be far away
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0x794C7630: "overlay",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
}
_LIBC = ctypes.CDLL(None, use_errno=True)


class Direct(NamedTuple):
    """Whether to read with O_DIRECT, and a line that says why ("" where nobody asked)."""

    use: bool
    note: str


def is_local(path: Path) -> bool:
    """Whether `path` lies on a filesystem that is known to be in this machine."""
    status = ctypes.create_string_buffer(256)  # struct statfs, which begins with the type as a long
    return _LIBC.statfs(os.fsencode(path), status) == 0 and ctypes.c_long.from_buffer(status).value in _LOCAL


def are_local(plan: MergePlan) -> bool:
    """Whether all inputs are on such filesystems."""
    folders = {file.path.parent for checkpoint in plan.inputs for file in checkpoint.files}
    return all(is_local(folder) for folder in folders)


def is_larger_than_cache(plan: MergePlan) -> bool:
    """Whether the inputs are too large to be left in the page cache."""
    return plan.bytes_to_read > CACHED_SHARE * physical_memory()


def physical_memory() -> int:
    """The bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_direct(plan: MergePlan, setting: str) -> Direct:
    """Decide about O_DIRECT for `setting` "auto", "on" or "off". Raises UsageError for another one.

    "auto" times both ways on the first bytes of the largest file, and wants a gain of a tenth. Where O_DIRECT cannot be had, reads
    are buffered whatever was asked.
    """
    if setting not in ("auto", "on", "off"):
        raise UsageError(f"--direct cannot be {setting!r}", details=["expected  auto, on, off"], hint="--direct auto")
    files = [max(checkpoint.files, key=lambda file: file.file_bytes) for checkpoint in plan.inputs if checkpoint.files]
    if setting == "off" or not files or (setting == "auto" and not is_larger_than_cache(plan)):
        return Direct(False, "")
    for file in files:
        try:
            _probe(file)
        except OSError as error:
            return Direct(False, f"inputs are read through the page cache: O_DIRECT fails for {file.path}: {error.strerror}")
    if setting == "on":
        return Direct(True, "")
    largest = max(files, key=lambda file: file.file_bytes)
    size = min(SAMPLE_BYTES, largest.file_bytes // 2)
    try:
        direct, buffered = _bytes_per_s(largest.path, 0, size, os.O_DIRECT), _bytes_per_s(largest.path, size, size, 0)
    except OSError as error:
        return Direct(False, f"inputs are read through the page cache: O_DIRECT fails for {largest.path}: {error.strerror}")
    use = direct >= _WORTHWHILE * buffered
    way = "with O_DIRECT" if use else "through the page cache"
    figures = f"{direct / 1e9:.2f} GB/s with O_DIRECT, {buffered / 1e9:.2f} GB/s without"
    return Direct(use, f"inputs are read {way}: the first {2 * size >> 20} MiB gave {figures} (--direct)")


def _probe(file: WeightFile) -> None:
    fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        os.preadv(fd, [mmap.mmap(-1, DIRECT_BLOCK_BYTES)], 0)
    finally:
        os.close(fd)


def _bytes_per_s(path: Path, begin: int, size: int, flags: int) -> float:
    """Time `size` bytes from `begin`, read by several threads; what the page cache holds of them is dropped first."""
    request, begin = LARGE_REQUEST_BYTES, begin // LARGE_REQUEST_BYTES * LARGE_REQUEST_BYTES
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(_SAMPLE_THREADS) as pool:
            buffers = [mmap.mmap(-1, request) for _ in range(_SAMPLE_THREADS)]

            def read(lane: int) -> int:
                starts = range(begin + lane * request, begin + size, _SAMPLE_THREADS * request)
                return sum(os.preadv(fd, [buffers[lane]], start) for start in starts)

            began = time.perf_counter()
            done = sum(pool.map(read, range(_SAMPLE_THREADS)))
        return max(done, 1) / max(time.perf_counter() - began, 1e-9)
    finally:
        os.close(fd)
