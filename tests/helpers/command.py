"""The command `pmerge` as a user runs it, without what a start costs.

Each run is a process of its own, forked from a server that has imported everything
(scripts/lib/faults/server.py): 0.1 s instead of the 2 s of an import of torch. The examples of the
README start the installed command itself.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Unpack

from faults.runs import Ended, FaultRuns, Run, Setting

_at_the_end = ExitStack()


@cache
def server() -> FaultRuns:
    """The server of this process of the tests, which conftest.py stops. It carries out one run at a
    time.
    """
    return _at_the_end.enter_context(FaultRuns())


def stop_server() -> None:
    """Stop the server if one was started."""
    _at_the_end.close()


def start(*arguments: object, cwd: Path, **setting: Unpack[Setting]) -> Run:
    """Start `pmerge arguments` in `cwd`, with the variables of this process unless `setting` has
    others.
    """
    setting.setdefault("environment", dict(os.environ))
    return server().start(arguments, cwd, timeout_s=120, **setting)


def pmerge(*arguments: object, cwd: Path, expect: int = 0, **setting: Unpack[Setting]) -> Ended:
    """Run `pmerge arguments` in `cwd`, which must end with the exit code that is expected and
    without a traceback.
    """
    done = start(*arguments, cwd=cwd, **setting).end()
    assert done.code == expect, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done
