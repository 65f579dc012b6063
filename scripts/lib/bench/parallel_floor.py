"""The least that a merge has to move, by as many threads: read all inputs, hash and write the
output, no arithmetic.

    python parallel_floor.py OUT THREADS COPIES CHECKPOINT...

Each thread takes the next piece of 1 MiB of the first checkpoint's files, reads the same bytes of
every checkpoint into one buffer, hashes those of the first, and writes them at their place, COPIES
times. Reading, hashing and writing give the interpreter's lock up, and their buffers are reused.
Files are reserved and made durable as pmerge's are. Prints the seconds of this loop as JSON.

Its hash is one for each piece, where pmerge's is one of a file, so that its threads never wait for
each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PIECE_BYTES = 1 << 20


def pieces_of(checkpoints: Sequence[Path], out: Path, copies: int) -> tuple[list[tuple[list[int], list[int], int, int]], list[int]]:
    """All pieces as (input descriptors, output descriptors, offset, size), and the outputs."""
    pieces, made = [], []
    for first in sorted(checkpoints[0].glob("*.safetensors")):
        inputs = [os.open(checkpoint / first.name, os.O_RDONLY) for checkpoint in checkpoints]
        size = min(os.fstat(fd).st_size for fd in inputs)
        outputs = []
        for k in range(copies):
            folder = out if copies == 1 else out / str(k)
            folder.mkdir(parents=True, exist_ok=True)
            outputs.append(os.open(folder / first.name, os.O_WRONLY | os.O_CREAT))
            os.posix_fallocate(outputs[-1], 0, size)
        made += outputs
        pieces += [(inputs, outputs, at, min(PIECE_BYTES, size - at)) for at in range(0, size, PIECE_BYTES)]
    return pieces, made


def run(checkpoints: Sequence[Path], out: Path, threads: int, copies: int) -> float:
    """Move everything; the seconds that it took."""
    began = time.perf_counter()
    pieces, made = pieces_of(checkpoints, out, copies)
    waiting = iter(pieces)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        try:
            while True:
                with lock:
                    piece = next(waiting, None)
                if piece is None:
                    return
                inputs, outputs, at, size = piece
                for fd in reversed(inputs):  # the first one's bytes stay
                    assert os.preadv(fd, [buffer[:size]], at) == size
                for fd in outputs:
                    hashlib.sha256(buffer[:size])
                    assert os.pwrite(fd, buffer[:size], at) == size
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    for fd in made:
        os.fsync(fd)
    return time.perf_counter() - began


if __name__ == "__main__":
    into, number, times, *paths = sys.argv[1:]
    print(json.dumps({"seconds": run([Path(path) for path in paths], Path(into), int(number), int(times))}))
