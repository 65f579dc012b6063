"""The command `pmerge`, also `python -m merge_cli`: the one place that turns exceptions into messages and exit codes."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

from merge_cli.errors import Interrupted, PmergeError


def main() -> None:
    """Run the command line and exit with 0 done, 1 failed, 2 wrong usage or input, 130 or 143 interrupted."""
    gc.set_threshold(1_000_000)  # a plan is millions of small tuples without cycles: walking them all takes as long as making them
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    from merge_cli.cli.app import app
    from merge_cli.cli.console import print_error

    try:
        app()
    except PmergeError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads stdout: no traceback at exit
        sys.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first signal stops at the next safe point; the next one ends the process at once."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_DFL)
    raise Interrupted(number, hint="run the same command again to continue")


if __name__ == "__main__":
    main()
