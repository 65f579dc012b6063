"""Differences between rows of a ledger, and whether they are more than chance.

Losses of the same documents are paired: the difference of each document counts, so that hard
documents cancel. Standard errors of two evaluations on the same questions, as of lm-eval, are
combined as if the questions were different ones, which is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_cli.trajectory.ledger import Row

TIE = 2.0  # standard errors
PAIRED, UPPER_BOUND = "paired by document", "upper bound"


@dataclass(frozen=True)
class Difference:
    """`value` with its standard error (None: not known), and where that comes from."""

    value: float
    error: float | None
    source: str

    @property
    def is_tie(self) -> bool:
        """Whether the difference may be chance; False where no error is known."""
        return self.error is not None and abs(self.value) < TIE * self.error


def sampling_error(rows: Sequence[Row], weights: Mapping[str, float], metric: str) -> tuple[float, str] | None:
    """The standard error of `sum_r w_r L_r` over the held-out text, for weights by key of the rows;
    None where it is not known.

    Each L_r is sum of nats / sum of tokens over the documents, which are the same for every row:
    their contributions to the weighted sum are independent, and their spread gives the error.
    """
    used = [(row, weights[row.key]) for row in rows if weights.get(row.key)]
    counts = {len(row.documents) for row, _ in used}
    if counts and min(counts) >= 2 and len(counts) == 1 and metric == "loss":
        tokens = [document.tokens for document in used[0][0].documents]
        if all([document.tokens for document in row.documents] == tokens for row, _ in used):
            return _paired(used, tokens), PAIRED
    if used and all(metric in row.errors for row, _ in used):
        return math.sqrt(math.fsum((weight * row.errors[metric]) ** 2 for row, weight in used)), UPPER_BOUND
    return None


def difference(one: Row, other: Row, metric: str) -> Difference:
    """`one` minus `other`."""
    value = one.metrics[metric] - other.metrics[metric]
    if one.key == other.key:
        return Difference(0.0, 0.0, PAIRED)
    error = sampling_error([one, other], {one.key: 1.0, other.key: -1.0}, metric)
    return Difference(value, *error) if error else Difference(value, None, "no error bars")


def _paired(used: Sequence[tuple[Row, float]], tokens: Sequence[int]) -> float:
    everything = sum(tokens)
    parts = [math.fsum(weight * row.documents[d].nats for row, weight in used) for d in range(len(tokens))]
    value = math.fsum(parts) / everything
    n = len(tokens)
    squares = math.fsum((part - value * count) ** 2 for part, count in zip(parts, tokens, strict=True))
    return math.sqrt(n / (n - 1) * squares) / everything
