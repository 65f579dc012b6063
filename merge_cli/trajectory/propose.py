"""The command that makes the merge which a forecast proposes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from merge_cli.trajectory.forecast import Forecast


def command_of(found: Forecast, checkpoints: Sequence[str]) -> str:
    """The command line for the proposed merge of the run at `checkpoints`; "" if there is no
    proposal.
    """
    if found.choice is None or found.newest is None:
        return ""
    parts = ["pmerge", "average", *checkpoints, "--method", found.choice.method, "--last", str(found.choice.n)]
    parts += ["--every", f"{found.choice.spacing:.0f}"]
    if any(warning.name == "newer checkpoints" for warning in found.warnings):
        parts += ["--to", f"{found.newest:.0f}"]
    return shlex.join(parts)
