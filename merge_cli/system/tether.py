"""A shell command that never outlives this process, not even when it is killed by SIGKILL.

The command runs in a process group of its own, beside a watcher that waits for the end of a pipe
whose other end is held here. When that end closes, because the command is done, is cut, or because
this process is gone, the watcher kills what is left of the group.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

_WRAPPER = 'exec 3<&0; { read -r _ <&3; kill -KILL 0; } & exec sh -c "$1" </dev/null 3<&-'


class Tether:
    """A command that has been started by `sh -c`, its output in the files `stdout` and `stderr`."""

    def __init__(self, command: str, environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
        read_end, self._end = os.pipe()
        try:
            with stdout.open("wb") as out, stderr.open("wb") as err:
                self._process = subprocess.Popen(
                    ["sh", "-c", _WRAPPER, "sh", command],
                    env=dict(environment),
                    stdin=read_end,
                    stdout=out,
                    stderr=err,
                    process_group=0,
                )
        except BaseException:
            os.close(self._end)
            raise
        finally:
            os.close(read_end)

    def wait(self) -> int:
        """The exit code (below 0: killed by that signal), once the command and all that it started
        have ended.
        """
        code = self._process.wait()
        self.cut()
        return code

    def cut(self) -> None:
        """Kill the command and all that it started."""
        end, self._end = self._end, -1
        if end >= 0:
            os.close(end)
