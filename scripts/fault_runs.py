"""Run `pmerge` with one fault each, fast: for `scripts/faults` and the tests of reliability.

A server process imports everything once, under `fault_shim.c`. For each run it forks a child, which arms its fault and then does
what the command `pmerge` does: a real process that can be killed, at the price of a fork instead of an import of torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

SHIM = Path(__file__).with_name("fault_shim.c")


@dataclass(frozen=True)
class Ended:
    """How a run ended: `code` is negative for a signal; `calls` matched the fault, `fired` if it happened."""

    code: int
    stdout: str
    stderr: str
    calls: int
    fired: bool
    seconds: float


class FaultRuns:
    """Starts the server, and stops it when the context ends."""

    def __enter__(self) -> FaultRuns:
        self._folder = tempfile.TemporaryDirectory(prefix="pmerge-faults-")
        library = Path(self._folder.name) / "fault_shim.so"
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True, timeout=60)
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
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
        fault: str = "",
        refuse: Mapping[str, int] | None = None,
        signals: Sequence[tuple[float, int]] = (),
        limits: Mapping[str, int] | None = None,
        user: int | None = None,
        timeout_s: float = 60,
        when_stopped: Callable[[], object] | None = None,
    ) -> Ended:
        """`pmerge arguments` in `cwd`, with the fault of `fault_shim.c`, calls that the filesystem `refuse`s (name -> errno),
        signals sent (after seconds, number), `limits` such as {"RLIMIT_NOFILE": 64}, as the user with this id. A run that a
        fault stops with signal 19 waits for `when_stopped` and goes on."""
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "fault": fault,
            "refuse": "".join(f",{name}={number}" for name, number in (refuse or {}).items()) + ",",
            "signals": signals,
            "limits": limits or {},
            "user": user,
            "timeout_s": timeout_s,
            "streams": [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")],
        }
        stdin, stdout = cast(TextIO, self._server.stdin), cast(TextIO, self._server.stdout)
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        while "stopped" in answer:
            if when_stopped is not None:
                when_stopped()
            os.kill(answer["stopped"], signal.SIGCONT)
            answer = json.loads(stdout.readline())
        texts = [Path(name).read_text(errors="replace") for name in request["streams"]]
        return Ended(answer["code"], *texts, answer["calls"], bool(answer["fired"]), answer["seconds"])


def serve() -> None:
    """Read requests from stdin, run them, answer on stdout."""
    import torch

    import merge_cli.__main__
    import merge_cli.averaging
    import merge_cli.cli.app
    import merge_cli.cli.average
    import merge_cli.cluster
    import merge_cli.engine.stream
    import merge_cli.output.joint
    import merge_cli.output.manifest
    import merge_cli.sharing
    from merge_cli.errors import PmergeError

    torch.set_num_threads(1)
    merge_cli.cluster.MIN_PIECE_BYTES = 2048  # cuts the small files of the tests too
    merge_cli.output.joint._CONTROL_WAIT_S = 0.3  # of a stopped rank
    with suppress(PmergeError):  # imports what is imported late, before a child has another user or few descriptors
        merge_cli.cli.app.app(["average", "/nowhere"], standalone_mode=False)
    shim = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
    for line in sys.stdin:
        request = json.loads(line)
        shim.fault_arm(b"")
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(request, shim)
        code = _wait(child, request["signals"], began, request["timeout_s"])
        answer = {
            "code": code,
            "calls": shim.fault_calls(),
            "fired": shim.fault_fired(),
            "seconds": time.monotonic() - began,
        }
        print(json.dumps(answer), flush=True)


def _wait(child: int, signals: list[tuple[float, int]], began: float, timeout_s: float) -> int:
    waiting = sorted(signals)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            print(json.dumps({"stopped": child}), flush=True)
        elif pid:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if waiting and passed >= waiting[0][0]:
            os.kill(child, waiting.pop(0)[1])
        if passed > timeout_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)


def _child(request: dict[str, Any], shim: ctypes.CDLL) -> None:
    from merge_cli.__main__ import main

    code = 70
    try:
        for target, name in zip((1, 2), request["streams"], strict=True):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), target)
        os.chdir(request["cwd"])
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        if request["user"] is not None:
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # whatever nohup or a shell made this process ignore
        sys.argv = ["pmerge", *request["arguments"]]
        shim.fault_refuse(request["refuse"].encode())
        shim.fault_arm(request["fault"].encode())
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
