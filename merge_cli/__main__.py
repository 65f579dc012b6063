"""The command `pmerge`, also `python -m merge_cli`: the one place that turns exceptions into
messages and exit codes.
"""

from __future__ import annotations

import _thread
import gc
import os
import select
import shlex
import signal
import sys
import warnings
from contextlib import suppress
from types import FrameType

from merge_cli.errors import Interrupted, PmergeError

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP, and must come as far as the message
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
GRACE_S = 1.5
_NO_MEMORY = ("Cannot allocate memory", "can't allocate memory", "failed to map segment")


def main() -> None:
    """Run the command line and exit with 0 done, 1 failed, 2 wrong usage or input, 129, 130 or 143
    interrupted.
    """
    from merge_cli.cli.console import report_error

    try:
        try:
            _require_linux()
            from merge_cli.system.descriptors import allow_open_files

            gc.set_threshold(
                1_000_000
            )  # a plan is millions of small tuples without cycles: walking them costs as much as making them
            _handle_signals()
            allow_open_files()
            os.umask(os.umask(0o077) & 0o077)  # one that takes the owner's own rights would lock the run out of its files
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch works without, and pmerge uses none
            from merge_cli.cli.app import run

            sys.exit(run())
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise PmergeError(f"{where}{error.strerror or error}") from error
        except (MemoryError, RuntimeError, ImportError) as error:
            if (limit := _limit_behind(error)) is None:
                raise
            raise limit from error
    except Interrupted as stop:
        report_error(stop)
        os._exit(stop.exit_code)
    except PmergeError as error:
        report_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads stdout: no traceback at exit
        sys.exit(1)


def _limit_behind(error: Exception) -> PmergeError | None:
    """The limit of the machine that `error` is about, None for any other error. torch and the
    loader of modules have no MemoryError of their own.
    """
    if "start new thread" in str(error):
        return PmergeError("no thread can be started", hint="a higher ulimit -u, or pids limit of the container")
    if isinstance(error, MemoryError) or any(each in str(error) for each in _NO_MEMORY):
        return PmergeError("not enough memory", hint="--memory 256MiB --threads 1, or a higher ulimit -v")
    return None


def _require_linux() -> None:
    if sys.platform != "linux":
        hint = "on Windows, run it in WSL; on macOS, in a Linux container"
        raise PmergeError(f"pmerge needs Linux, and this is {sys.platform}", hint=hint)


def _handle_signals() -> None:
    """The first signal stops at the next safe point; the second, or the end of `GRACE_S`, ends the
    process at once.

    A signal that the process was started to ignore (nohup) stays ignored. The handler runs when the
    main thread is back from the system call it is in, which a slow disk can hold for long. So a
    second thread receives the signal too, and does not wait for that: any moment is a safe point,
    since a killed run can be continued.
    """
    heard, wakeup = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    with suppress(RuntimeError):  # no thread can be had: signals then wait for the system call to end
        _thread.start_new_thread(_watch, (heard,))  # Thread.start() waits for ever for one that dies of no memory
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        if signal.getsignal(other) == _interrupt:
            signal.signal(other, signal.SIG_DFL)
    raise _interrupted(number)


def _interrupted(number: int) -> Interrupted:
    return Interrupted(number, hint=f"to continue, run the same command again:  {shlex.join(['pmerge', *sys.argv[1:]])}")


def _watch(heard: int) -> None:
    number = os.read(heard, 1)[0]
    if not select.select([heard], [], [], GRACE_S)[0]:
        _give_up(number)
    os._exit(128 + os.read(heard, 1)[0])


def _give_up(number: int) -> None:
    from merge_cli.cli.console import print_error

    print_error(_interrupted(number))
    os._exit(128 + number)


if __name__ == "__main__":
    main()
