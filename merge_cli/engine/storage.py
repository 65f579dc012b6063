"""Facts about the storage that inputs lie on: local or not, larger than the page cache or not.

Network filesystems want few large requests; data that is local, or in the page cache, is best taken
in pieces that are still in the processor's cache when they are added up.
"""

from __future__ import annotations

import os
from pathlib import Path

from merge_cli.planning.extent import Location
from merge_cli.planning.plan import MergePlan
from merge_cli.stores.local import LocalSource
from merge_cli.stores.store import is_local, open_store
from merge_cli.system.files import TMPFS, filesystem_type

LARGE_REQUEST_BYTES = 4 << 20
CACHED_SHARE = 0.25  # of the memory: larger inputs are not left in the page cache
_LOCAL = {  # linux/magic.h; what is not here may be far away
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0x794C7630: "overlay",
    TMPFS: "tmpfs",
    0x858458F6: "ramfs",
}


def _is_on_known_disk(path: Path) -> bool:
    """Whether `path` lies on a filesystem that is known to be in this machine."""
    return filesystem_type(path) in _LOCAL


def are_local(plan: MergePlan) -> bool:
    """Whether all inputs are on such filesystems."""
    sources = [file.source for checkpoint in plan.inputs for file in checkpoint.files]
    if not all(isinstance(source, LocalSource) for source in sources):
        return False
    return all(_is_on_known_disk(folder) for folder in {Path(source.path).parent for source in sources})


def requests_at_once(plan: MergePlan) -> int:
    """How many threads the stores of the inputs can keep busy, see `Store`."""
    return max(open_store(checkpoint.path).requests_at_once for checkpoint in plan.inputs)


def requests_for(plan: MergePlan, chunk_bytes: int) -> int:
    """About how many requests reading the weights takes that are not on this machine: a link for
    each file, and ranges of it.
    """
    if all(is_local(checkpoint.path) for checkpoint in plan.inputs):
        return 0
    links = sum(len(checkpoint.files) for checkpoint in plan.inputs if not is_local(checkpoint.path))
    ranges = 0
    for extent in (extent for file in plan.files for extent in file.extents):
        for source, size in zip(extent.sources, extent.source_bytes, strict=True):
            file = source.file if isinstance(source, Location) else source.parts[0].file
            ranges += 0 if is_local(file.path) else -(-size // chunk_bytes)
    return links + ranges


def is_larger_than_cache(plan: MergePlan) -> bool:
    """Whether the inputs are too large to be left in the page cache."""
    return plan.bytes_to_read > CACHED_SHARE * physical_memory()


def physical_memory() -> int:
    """The bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
