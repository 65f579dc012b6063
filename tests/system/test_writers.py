"""Processes that may write to files are found, as far as /proc shows them. They are real ones: a
mapping of this process would be left out.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from builders import training_run, write_run

from merge_cli import average
from merge_cli.errors import ChangedError
from merge_cli.system.writers import find_writer

HOLDERS = {
    "read": "file = open(path, 'rb')",
    "append": "file = open(path, 'ab')",
    "update": "file = open(path, 'r+b')",
    "mapping, file closed": """
file = open(path, 'r+b')
libc = ctypes.CDLL(None)  # Python's mmap keeps the file open
libc.mmap.restype = ctypes.c_void_p
at = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0))
assert at != ctypes.c_void_p(-1).value
file.close()
""",
    "private mapping": "file = open(path, 'rb'); m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY); file.close()",
    "mapping to read": "file = open(path, 'rb'); m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)",
}
HARMLESS = ("read", "private mapping", "mapping to read")


@contextmanager
def held(path: Path, how: str) -> Iterator[int]:
    """The id of a process that holds the file in this way."""
    script = f"import ctypes, mmap, sys\npath = sys.argv[1]\n{HOLDERS[how]}\nprint('held', flush=True)\nsys.stdin.readline()"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "held\n"
        yield process.pid
        process.stdin.write("\n")


@pytest.mark.parametrize("how", HOLDERS)
def test_whoever_may_write_is_found(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(bytes(5000))
    with held(path, how) as pid:
        found = find_writer({str(path), str(tmp_path / "other")})
        assert find_writer({str(tmp_path / "other")}) is None
    if how in HARMLESS:
        assert found is None
    else:
        assert found is not None
        assert (found.path, found.pid, found.is_mapped) == (str(path), pid, "closed" in how)
        assert found.command.startswith(sys.executable)
    assert find_writer({str(path)}) is None


def test_an_input_that_a_process_may_write_to_stops_the_run_and_both_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training_run({"w": torch.arange(3000.0)}, 2))
    shard = next(run[0].glob("*.safetensors"))
    with held(shard, "mapping, file closed") as pid, pytest.raises(ChangedError) as caught:
        average(run, tmp_path / "out")
    assert caught.value.message == f"a process of this host holds {shard} mapped for writing"
    assert f"process {pid}: " in caught.value.details[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.pmerge-partial").exists()
    average(run, tmp_path / "out")
