"""The user's evaluation command: its substitutions, and its environment.

`{path}`, `{name}`, `{step}` and `{out}` are replaced, quoted for the shell; PMERGE_PATH,
PMERGE_NAME, PMERGE_STEP, PMERGE_OUT and PMERGE_RESULT are set, which needs no quoting at all. A
placeholder inside quotes of the command's own is an error: the quotes that it needs itself would
end those around it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from merge_cli.errors import UsageError

PLACEHOLDERS = ("path", "name", "step", "out")
_PLACEHOLDER = re.compile(r"\{(" + "|".join(PLACEHOLDERS) + r")\}")
_CACHE = re.compile(r"--use_cache\b|\blm[-_]eval\b.*\s-c\s")  # of lm-eval 0.4; --cache_requests keeps prompts only


def check_command(command: str, flag: str = "--command") -> list[str]:
    """Warnings about a command that `flag` gave. Raises UsageError where it cannot be filled in
    safely.
    """
    if not command.strip():
        raise UsageError(f"{flag} is empty", hint=f"{flag} 'python eval.py {{path}}'")
    used = set()
    for match in _PLACEHOLDER.finditer(command):
        used.add(match[1])
        variable = f'"$PMERGE_{match[1].upper()}"'
        if command[: match.start()].endswith("$"):
            raise UsageError(f"{flag} has ${match[0]}, which is a variable of the shell", hint=f"write {match[0]}, or {variable}")
        quote = _open_quote(command[: match.start()])
        if quote:
            raise UsageError(
                f"{flag} has {match[0]} inside {quote} quotes",
                details=["a path with a space or a quote in it would end them"],
                hint=f"take it out of the quotes, or use {variable} there",
            )
    warnings = []
    if "path" not in used and "PMERGE_PATH" not in command:
        warnings.append(f"{flag} has neither {{path}} nor $PMERGE_PATH: is it the checkpoint that it evaluates?")
    if _CACHE.search(command):
        warnings.append(
            f"{flag} uses a cache of results, which is keyed by the request and not by the weights:"
            " every merge may get the numbers of the first; leave it out"
        )
    return warnings


def fill(command: str, values: Mapping[str, str]) -> str:
    """The command for one checkpoint: placeholders replaced by shell-quoted `values` (path, name,
    step, out).
    """
    return _PLACEHOLDER.sub(lambda match: shlex.quote(values[match[1]]), command)


def variables(values: Mapping[str, str], result: Path) -> dict[str, str]:
    """The PMERGE_ variables for one checkpoint; `result` is where the command may write a JSON
    object of numbers.
    """
    return {**{f"PMERGE_{name.upper()}": values[name] for name in PLACEHOLDERS}, "PMERGE_RESULT": str(result)}


def _open_quote(text: str) -> str:
    """Which quotes are open at the end of `text`, a piece of shell: "single", "double" or ""."""
    quote, escaped = "", False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\" and quote != "single":
            escaped = True
        elif character == "'" and quote != "double":
            quote = "" if quote else "single"
        elif character == '"' and quote != "single":
            quote = "" if quote else "double"
    return quote
