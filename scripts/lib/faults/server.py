"""The server of `runs.py`: reads requests as lines of JSON, forks a child for each, answers when
the child stops or ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONSTANTS = {
    "MIN_PIECE_BYTES": 2048,  # cuts the small files of the tests too
    "_CONTROL_WAIT_S": 0.3,  # for a stopped rank
}


def main() -> None:
    import_everything()
    set_constants(CONSTANTS)
    shim = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
    for line in sys.stdin:
        request = json.loads(line)
        shim.fault_arm(b"")
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            become_pmerge(request, shim)
        print(json.dumps({"started": child}), flush=True)
        code, hung, peak_bytes = wait(child, request["signals"], began, request["timeout_s"])
        answer = {
            "code": code,
            "calls": shim.fault_calls(),
            "fired": bool(shim.fault_fired()),
            "seconds": time.monotonic() - began,
            "hung": hung,
            "peak_bytes": peak_bytes,
        }
        print(json.dumps(answer), flush=True)


def import_everything() -> None:
    """All modules, and by two whole runs those that are imported late: a child may have another
    user, or few descriptors.
    """
    import torch
    from safetensors.torch import save_file

    import merge_cli
    from merge_cli.cli.app import make_app

    torch.set_num_threads(1)
    app = make_app()
    package = Path(merge_cli.__file__).parent
    for path in package.rglob("*.py"):  # pkgutil would take the library of the kernels for a module
        importlib.import_module(".".join(("merge_cli", *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"))
    with tempfile.TemporaryDirectory(prefix="pmerge-faults-") as folder:
        for step in (1, 2):
            path = Path(folder) / "in" / f"checkpoint-{step}" / "model.safetensors"
            path.parent.mkdir(parents=True)
            save_file({"a": torch.zeros(2)}, path)
        out = f"{folder}/out"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            app(["average", f"{folder}/in", "-o", out, "--quiet"], standalone_mode=False)
            app(["verify", out, "--against-inputs", "--quiet"], standalone_mode=False)


def set_constants(values: Mapping[str, object]) -> None:
    """Set constants of merge_cli in all modules that have them: modules move, names stay."""
    for name, value in values.items():
        modules = [vars(module) for key, module in sys.modules.items() if key.startswith("merge_cli")]
        holders = [variables for variables in modules if name in variables]
        if not holders:
            raise SystemExit(f"no module of merge_cli has {name} any more")
        for variables in holders:
            variables[name] = value


def wait(child: int, signals: list[tuple[float, int]], began: float, timeout_s: float) -> tuple[int, bool, int]:
    """Wait for the end of the child: its exit code, whether that took too long, its peak memory.
    Reports when it is stopped.
    """
    waiting, hung, stopped = sorted(signals), False, 0.0
    stopped_for = 0.0
    parent = os.getppid()
    while True:
        if os.getppid() != parent:  # nobody waits for the answer
            os.kill(child, signal.SIGKILL)
            sys.exit(1)
        pid, status, usage = os.wait4(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        now = time.monotonic()
        if pid and os.WIFSTOPPED(status):
            stopped = now
            print(json.dumps({"stopped": child}), flush=True)
        elif pid and os.WIFCONTINUED(status):
            stopped_for += now - stopped
            stopped = 0.0
        elif pid:
            return os.waitstatus_to_exitcode(status), hung, usage.ru_maxrss * 1024
        passed = now - began - stopped_for
        if waiting and passed >= waiting[0][0]:
            os.kill(child, waiting.pop(0)[1])
        if passed > timeout_s and not stopped:
            hung = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005 if passed < 1 else 0.005)


def become_pmerge(request: dict[str, Any], shim: ctypes.CDLL) -> None:
    """In the child: take the circumstances of the request, run the command, end."""
    from merge_cli.__main__ import main as pmerge

    code = 70
    setting = request["setting"]
    try:
        for target, name in zip((1, 2), request["into"], strict=True):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), target)
        os.chdir(request["cwd"])
        if "environment" in setting:
            os.environ.clear()
            os.environ.update(setting["environment"])
        set_constants(setting.get("constants", {}))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # whatever nohup or a shell made this process ignore
        break_streams(setting.get("streams", {}))
        limit(setting)
        sys.argv = ["pmerge", *request["arguments"]]
        refused = "".join(f",{name}={number}" for name, number in setting.get("refuse", {}).items())
        shim.fault_refuse(f"{refused},".encode())
        shim.fault_skew(setting.get("clock_s", 0))
        if "record" in setting:
            log, folder = setting["record"]
            shim.fault_record(folder.encode(), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
        shim.fault_arm(setting.get("fault", "").encode())
        pmerge()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)


def limit(setting: Mapping[str, Any]) -> None:
    for name, value in setting.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if "room" in setting:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + setting["room"],) * 2)
    if setting.get("without_proc"):
        hide_proc()
    if "umask" in setting:
        os.umask(setting["umask"])
    if setting.get("user") is not None:
        os.setgroups([])
        os.setgid(setting["user"])
        os.setuid(setting["user"])


def hide_proc() -> None:
    """An empty /proc for this process alone, as in some containers. Raises OSError for whoever is
    not root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x20000, 0x44000  # linux/sched.h, linux/mount.h
    done = libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None)
    if done or libc.mount(b"none", b"/proc", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "cannot hide /proc")


def break_streams(streams: Mapping[str, str]) -> None:
    """Make stdout or stderr what a careless parent leaves: closed, a full disk, a pipe that nobody
    reads.
    """
    for name, how in streams.items():
        number = {"stdout": 1, "stderr": 2}[name]
        if how == "closed":
            os.close(number)
            setattr(sys, name, None)  # as Python does when it starts
            continue
        reader, writer = os.pipe() if how == "broken" else (-1, os.open("/dev/full", os.O_WRONLY))
        os.dup2(writer, number)
        for descriptor in (reader, writer):
            if descriptor >= 0:
                os.close(descriptor)


if __name__ == "__main__":
    main()
