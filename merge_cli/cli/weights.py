"""`PATH:WEIGHT`: a weight typed behind each checkpoint."""

from __future__ import annotations

from merge_cli.errors import UsageError
from merge_cli.stores.store import as_path, open_store


def split_weights(arguments: list[str]) -> tuple[list[str], list[float] | None]:
    """The paths and weights of PATH:WEIGHT arguments; no weights (None) if no argument has one.
    Raises UsageError.
    """
    pairs = [argument.rpartition(":") for argument in arguments]
    weighted = [
        bool(path) and _is_float(weight) and not _exists(argument)
        for argument, (path, _, weight) in zip(arguments, pairs, strict=True)
    ]
    for argument, (path, _, weight), is_weighted in zip(arguments, pairs, weighted, strict=True):
        if path and not is_weighted and not _exists(argument) and _exists(path):
            raise UsageError(f"{argument}: {weight!r} is not a weight", details=["expected  PATH:WEIGHT"], hint=f"{path}:0.5")
    if not any(weighted):
        return arguments, None
    if not all(weighted):
        missing = arguments[weighted.index(False)]
        raise UsageError(f"{missing} has no weight, others have", hint=f"{missing}:0.5")
    return [path for path, _, _ in pairs], [float(weight) for _, _, weight in pairs]


def _exists(path: str) -> bool:
    path = as_path(path)
    return open_store(path).stat(path) is not None


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
