"""Compile the native kernel beside this file with the C compiler that is there, as `setup.py` does.

    python merge_cli/engine/kernels/build.py

One C file is compiled for several instruction sets. Fused multiply-add is switched on in none of
them, and `-ffp-contract=off` comes after CFLAGS, so that products are rounded before they are
added. The library carries the digest of its sources, and a library of other sources is not loaded.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "average.so"
SOURCES = ("average.c", "build.py", "convert.h", "decode.h", "kernel.h", "table.c")
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
KERNELS = {
    "base": [],
    "v3": ["-mavx2"],
    "v4": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}


class BuildError(Exception):
    """There is no compiler, or it failed."""


def digest() -> str:
    """The sha256 of the sources, as the library has it too."""
    found = hashlib.sha256()
    for name in SOURCES:
        found.update((FOLDER / name).read_bytes())
    return found.hexdigest()


def is_current(library: Path = LIBRARY) -> bool:
    """Whether `library` was built from the sources as they are."""
    return library.exists() and digest().encode() in library.read_bytes()


def compiler() -> list[str]:
    """The command of the C compiler: CC, or the first of cc, gcc and clang. Raises BuildError."""
    import shlex
    import shutil

    if chosen := shlex.split(os.environ.get("CC", "")):
        return chosen
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C compiler found")


def build(library: Path = LIBRARY, extra: tuple[str, ...] = ()) -> None:
    """Compile and link `library`, with the flags `extra` last. Raises BuildError."""
    import shlex
    import shutil
    import tempfile

    cc = [*compiler(), *shlex.split(os.environ.get("CFLAGS", "")), *FLAGS, *extra]
    is_x86 = _run([*cc, "-dumpmachine"]).startswith("x86_64")
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        names = list(KERNELS) if is_x86 else ["base"]
        for name in names:
            objects.append(f"{folder}/{name}.o")
            define = f"-DPMERGE_AVERAGE=pmerge_average_{name}"
            _run([*cc, *KERNELS[name], define, "-c", str(FOLDER / "average.c"), "-o", objects[-1]])
        defines = [f'-DPMERGE_SOURCES="{digest()}"', *(f"-DPMERGE_{name.upper()}" for name in names)]
        _run([*cc, *defines, "-c", str(FOLDER / "table.c"), "-o", f"{folder}/table.o"])
        linked = f"{folder}/average.so"
        _run([*cc, *shlex.split(os.environ.get("LDFLAGS", "")), "-shared", f"{folder}/table.o", *objects, "-o", linked])
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(".new")
        shutil.copy(linked, temporary)
        temporary.replace(library)  # at once: a process may have the old one mapped


def _run(command: list[str]) -> str:
    import shlex
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    try:
        if not is_current():
            build()
    except BuildError as error:
        sys.exit(f"the native kernel was not built: {error}")
