"""Run `pmerge` with one fault each, fast: for `scripts/faults` and the tests of reliability.

A server process imports everything once, under `shim.c`. For each run it forks a child, which arms
its fault and then does what the command `pmerge` does: a real process that can be stopped and
killed, at the price of a fork instead of an import of torch. Several runs at the same time take as
many servers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypedDict, Unpack, cast

SHIM = Path(__file__).with_name("shim.c")
SERVER = Path(__file__).with_name("server.py")


class Setting(TypedDict, total=False):
    """What is wrong around one run."""

    fault: str  # of shim.c: call:at:action:value:match
    refuse: Mapping[str, int]  # calls that the filesystem lacks, with their errno; 0: it pretends that they succeeded
    limits: Mapping[str, int]  # such as {"RLIMIT_NOFILE": 64}
    room: int  # bytes of address space beyond those in use at the start
    user: int | None  # run as the user with this id
    umask: int
    without_proc: bool
    clock_s: int  # the clock is wrong by so many seconds
    streams: Mapping[str, str]  # {"stdout": "full"}: also "stderr", "closed", and "broken", a pipe that nobody reads
    record: tuple[str, str]  # a file for the record of all changes below a folder
    constants: Mapping[str, object]  # of modules of merge_cli, by name wherever they are
    environment: Mapping[str, str]  # all variables, instead of the server's


@dataclass(frozen=True)
class Ended:
    """How a run ended: `code` is negative for a signal; `calls` matched the fault, `fired` if it
    happened.

    `hung`: it was killed at its time limit. `peak_bytes`: its largest resident size, with that of
    the server that it began with.
    """

    code: int
    stdout: str
    stderr: str
    calls: int
    fired: bool
    seconds: float
    hung: bool
    peak_bytes: int


class Run:
    """A run that was started, and goes on by itself until it ends or a fault stops it (signal 19)."""

    def __init__(self, server: subprocess.Popen[str], streams: Sequence[str]) -> None:
        self._server = server
        self._streams = streams
        self._answer: dict[str, Any] = {}
        self.pid: int = json.loads(cast(TextIO, server.stdout).readline())["started"]

    @property
    def is_running(self) -> bool:
        """Whether the run has not ended yet."""
        return Path(f"/proc/{self.pid}").exists()

    def send(self, number: int) -> None:
        """Send a signal to the run, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def stops(self) -> bool:
        """Wait until the run stops; False if it ended instead."""
        self._answer = json.loads(cast(TextIO, self._server.stdout).readline())
        return "stopped" in self._answer

    def go_on(self, number: int = signal.SIGCONT) -> None:
        """Let a run that has stopped go on, or kill it."""
        os.kill(self._answer["stopped"], number)
        self._answer = {}

    def end(self, when_stopped: Callable[[], object] | None = None) -> Ended:
        """Wait for the end. Each time that it stops, `when_stopped` is called and the run goes on."""
        while "code" not in self._answer:
            if "stopped" in self._answer or self.stops():
                if when_stopped is not None:
                    when_stopped()
                self.go_on()
        stdout, stderr = (Path(name).read_text(errors="backslashreplace") for name in self._streams)
        return Ended(stdout=stdout, stderr=stderr, **self._answer)


class FaultRuns:
    """Starts the server, and stops it when the context ends."""

    def __enter__(self) -> FaultRuns:
        self._folder = tempfile.TemporaryDirectory(prefix="pmerge-faults-")
        library = Path(self._folder.name) / "shim.so"
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True, timeout=60)
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # a stopped child is hung up on when the group it belongs to loses its terminal
        )
        return self

    def __exit__(self, *exc: object) -> None:
        cast(TextIO, self._server.stdin).close()
        self._server.wait(60)
        cast(TextIO, self._server.stdout).close()
        self._folder.cleanup()

    def run(
        self,
        arguments: Sequence[object],
        cwd: Path,
        *,
        signals: Sequence[tuple[float, int]] = (),
        timeout_s: float = 60,
        when_stopped: Callable[[], object] | None = None,
        **setting: Unpack[Setting],
    ) -> Ended:
        """`pmerge arguments` in `cwd` to its end; the time that a run is stopped does not count.
        See `start`.
        """
        return self.start(arguments, cwd, signals=signals, timeout_s=timeout_s, **setting).end(when_stopped)

    def start(
        self,
        arguments: Sequence[object],
        cwd: Path,
        *,
        signals: Sequence[tuple[float, int]] = (),
        timeout_s: float = 60,
        **setting: Unpack[Setting],
    ) -> Run:
        """Start `pmerge arguments` in `cwd`, with signals sent (after seconds, number). The run
        before must have ended.
        """
        streams = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "signals": signals,
            "timeout_s": timeout_s,
            "into": streams,
            "setting": setting,
        }
        stdin = cast(TextIO, self._server.stdin)
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return Run(self._server, streams)
