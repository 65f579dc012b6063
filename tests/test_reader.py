"""Reading the inputs: what stays in the page cache."""

import os
from pathlib import Path

import pytest
import torch
from builders import write_checkpoint

from merge_cli.engine.reader import InputFiles
from merge_cli.formats.checkpoint import open_checkpoint


def cached(path: Path, offset: int) -> bool:
    """Whether a page of the file can be had without waiting for the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(4096)], offset, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


@pytest.mark.parametrize("keep", [True, False])
def test_what_was_read_stays_cached_unless_told_otherwise(keep: bool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"w": torch.ones(4 << 20)})
    file = open_checkpoint(path).files[0]
    fd = os.open(file.path, os.O_RDONLY)
    os.fsync(fd)  # only clean pages can be given back
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached(file.path, 8 << 20):
            pytest.skip("this filesystem is memory (tmpfs): nothing can be dropped")
    except OSError as error:
        pytest.skip(f"this filesystem cannot say what is cached: {error.strerror}")
    finally:
        os.close(fd)
    with InputFiles(keep_cached=keep) as inputs:
        inputs.read_into(file, 0, memoryview(bytearray(file.file_bytes)))
    assert cached(file.path, 8 << 20) == keep
