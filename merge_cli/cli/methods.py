"""`pmerge methods`: the methods, and the coefficients they give. Needs no checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from merge_cli.cli import console
from merge_cli.cli.options import Given, Json, method_flags, takes
from merge_cli.errors import UsageError
from merge_cli.request.methods import METHOD_SYNONYMS, METHODS, coefficients
from merge_cli.request.option import nearest


@takes(*method_flags(each for each in METHODS.values() if not each.is_explicit))
def methods_command(
    name: Annotated[str | None, typer.Argument(help="One method; all if none is given.")] = None,
    *,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of checkpoints.")] = 10,
    given: Given,
    as_json: Json = False,
) -> None:
    """List the methods with formula, source and coefficients for N checkpoints, oldest first.

    Example:  pmerge methods ema --n 10 --alpha 0.1
    """
    if name is not None and name not in METHODS:
        meant = nearest(name, METHODS, METHOD_SYNONYMS)
        hint = f"did you mean  pmerge methods {meant}" if meant else "pmerge methods"
        raise UsageError(f"unknown method {name!r}", details=[f"expected  {', '.join(METHODS)}"], hint=hint)
    steps = [float(i + 1) for i in range(n)]
    found = []
    for method in METHODS.values() if name is None else [METHODS[name]]:
        own = given if name is not None else {k: v for k, v in given.items() if k in method.parameters}
        weights = None if method.is_explicit else coefficients(method.name, steps, **own)
        found.append((method, weights))
    if as_json:
        console.out_json(
            [
                {
                    "method": method.name,
                    "summary": method.summary,
                    "formula": method.formula,
                    "source": method.source,
                    "coefficients": weights and weights.values,
                    "effective_sample_size": weights and weights.effective_sample_size,
                    "mean_age": weights and weights.mean_age(),
                }
                for method, weights in found
            ]
        )
        return
    for method, weights in found:
        console.out_text(f"{method.name}: {method.summary}")
        rows = [("formula", method.formula), ("source", method.source)]
        for parameter in method.parameters.values():
            default = "" if parameter.default is None else f" (default {parameter.default})"
            choices = f": {', '.join(parameter.choices)}" if parameter.choices else ""
            rows.append((parameter.flag, f"{parameter.help}{choices}{default}"))
        if weights is not None:
            rows.append(("coefficients", " ".join(f"{value:.4f}" for value in weights.values)))
            size, age = weights.effective_sample_size, weights.mean_age()
            rows.append(("effective", f"as little noise as a plain average of {size:.2f} of {n} (effective sample size)"))
            rows.append(("mean age", f"on average {age:.2f} checkpoints behind the newest"))
        for line in console.table(("", ""), rows)[1:]:
            console.out(line)
        if len(found) > 1:
            console.out("")
