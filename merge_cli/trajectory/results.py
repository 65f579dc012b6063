"""What an evaluation command leaves behind, as numbers by name.

Taken from the first of: the file PMERGE_RESULT (a JSON object); the newest `results*.json` below
the output folder, as lm-eval writes it; the last line of stdout that is a JSON object or a number.
Nested objects become names with dots (`hellaswag.acc,none`); a number under a name with `_stderr`
is the standard error of the metric without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import PmergeError
from merge_cli.stores.store import read_file
from merge_cli.system.json_text import parse_json
from merge_cli.trajectory.ledger import Document

MAX_RESULT_BYTES = 64 << 20
_MOST_METRICS = 10_000
_LOSS = re.compile(r"(?:^|[^a-z])(?:\w*loss|nll|bpb|bits_per_byte|cross_entropy|xent)(?:$|[^a-z])", re.IGNORECASE)
_LOWER = re.compile(r"loss|nll|perplexity|ppl|bpb|bits_per_byte|cross_entropy|xent|error|brier", re.IGNORECASE)


class ResultError(PmergeError):
    """An evaluation left no numbers that can be read."""


@dataclass(frozen=True)
class Result:
    """Metrics and their standard errors by name, the losses by document where there are any, and
    where they come from.
    """

    metrics: Mapping[str, float]
    errors: Mapping[str, float]
    documents: tuple[Document, ...]
    source: str


def read_result(result_file: Path, out: Path, stdout: str) -> Result:
    """The result of one evaluation. Raises ResultError."""
    if result_file.exists():
        return _result(_parse(read_file(str(result_file), MAX_RESULT_BYTES), "PMERGE_RESULT"), "PMERGE_RESULT")
    written = sorted(out.rglob("results*.json"), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    if written:
        return _result(_parse(read_file(str(written[-1]), MAX_RESULT_BYTES), written[-1].name), written[-1].name)
    for line in reversed(stdout.splitlines()):
        value = _value_of(line)
        if value is not None:
            return _result(value, "stdout")
    raise ResultError(
        "the evaluation left no result",
        details=[
            "expected  a JSON object in the file $PMERGE_RESULT, a results*.json of lm-eval below {out},",
            "          or a line of stdout that is a number or a JSON object",
        ],
    )


def pick(metrics: Mapping[str, float], wanted: Sequence[str]) -> list[str]:
    """The names in `metrics` that `wanted` mean, with or without lm-eval's `results.` in front.
    Raises ResultError.
    """
    found = []
    for path in wanted:
        name = next((name for name in (path, path.removeprefix("results.")) if name in metrics), None)
        if name is None:
            raise ResultError(f"the result has no metric {path}", details=[f"found     {', '.join(list(metrics)[:20])}"])
        found.append(name)
    return found


def is_loss(name: str) -> bool:
    """Whether a metric of this name is a loss in nats or bits, for which the loss model holds."""
    return bool(_LOSS.search(name)) and "_stderr" not in name


def lower_is_better(name: str) -> bool:
    """Whether smaller values of a metric of this name are better: losses, perplexities, error
    rates.
    """
    return bool(_LOWER.search(name))


def main_metric(names: Sequence[str]) -> str:
    """The metric that is shown unless another is asked for: the first that is a loss, else the
    first.
    """
    return next((name for name in names if is_loss(name)), names[0])


def digits(metrics: Mapping[str, float]) -> int:
    """How many significant digits all numbers of a result have together: with few, equal results
    may be chance.
    """
    return sum(len(repr(abs(value)).split("e")[0].replace(".", "").strip("0")) for value in metrics.values())


def _result(value: Any, source: str) -> Result:
    if isinstance(value, dict) and isinstance(value.get("results"), dict):
        value = {  # lm-eval 0.4: the rest is configuration, dates and times
            task: {name: number for name, number in found.items() if name != "sample_len"} if isinstance(found, dict) else found
            for task, found in value["results"].items()
        }
    documents: tuple[Document, ...] = ()
    if isinstance(value, dict) and isinstance(value.get("documents"), list):
        value = {**value}
        documents = tuple(_document(entry) for entry in value.pop("documents"))
    flat = dict(_flatten(value, "value" if not isinstance(value, dict) else ""))
    if len(flat) > _MOST_METRICS:
        raise ResultError(f"the result has {len(flat)} numbers", details=[f"expected  at most {_MOST_METRICS}"])
    broken = [name for name, number in flat.items() if not math.isfinite(number)]
    errors = {
        name.replace("_stderr", "", 1): number for name, number in flat.items() if "_stderr" in name and math.isfinite(number)
    }
    metrics = {name: number for name, number in flat.items() if "_stderr" not in name}
    broken = [name for name in broken if name in metrics]
    if broken:
        raise ResultError(f"the result is not finite: {', '.join(f'{name} is {flat[name]}' for name in broken[:5])}")
    if not metrics:
        raise ResultError(f"the result in {source} has no numbers")
    return Result(metrics, errors, documents, source)


def _value_of(line: str) -> Any:
    """The object or number that a line of stdout is; None for any other line. `nan` is a number,
    and an error later on.
    """
    try:
        value = parse_json(line)
    except ValueError:
        try:
            return float(line)
        except ValueError:
            return None
    return value if isinstance(value, dict | int | float) and not isinstance(value, bool) else None


def _flatten(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flatten(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value) if isinstance(value, float) or abs(value) < 2**1023 else math.inf


def _parse(text: bytes, name: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ResultError(f"{name} is not valid JSON: {error}") from error


def _document(entry: Any) -> Document:
    if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(x, int | float) and math.isfinite(x) for x in entry)):
        raise ResultError(f"a document of the result is {str(entry)[:60]}", details=["expected  [nats, tokens, bytes]"])
    return Document(float(entry[0]), int(entry[1]), int(entry[2]))
