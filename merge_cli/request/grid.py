"""The outputs of a sweep: combinations of a method and a selection, from a grid or from a list.

    --method sma,ema:0.1 --last 6,10 --every 1000    ->    sma-last6-every1000, sma-last10-every1000, ema-0.1-last6-every1000, ...

A combination holds the options of one `pmerge average`, under a name that is safe as a folder and
lists them. Whether checkpoints exist for it is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from merge_cli.errors import UsageError
from merge_cli.names import STAGING_SUFFIX
from merge_cli.request.methods import DEFAULT, METHOD_SYNONYMS, METHODS, PARAMETERS, check_parameters, coefficients, implied_method
from merge_cli.request.option import not_a_choice, options_of
from merge_cli.request.spec import Selection

OF_ALL_OUTPUTS = ("order", "tokens_per_step", "base", "incomplete", "allow_merged")
SELECTION = {each.name: each for each in options_of(Selection) if each.name not in OF_ALL_OUTPUTS}
_MOST_NAME_BYTES = 150
_NAME = re.compile(r"[A-Za-z0-9_=+][A-Za-z0-9_.=+-]*")


@dataclass(frozen=True)
class Combination:
    """One output of a sweep: the `name` of its folder, the `method` with its `parameters`, and the
    `selection` by option.
    """

    name: str
    method: str
    parameters: Mapping[str, Any]
    selection: Mapping[str, Any]


def grid(
    methods: Sequence[str], last: Sequence[int] = (), every: Sequence[int | str] = (), at: Sequence[int | str] = ()
) -> list[Combination]:
    """Every method with every `last`, `every` and `at`; an empty axis is left out. Raises
    UsageError.

    A method is a name, alone or with parameters: "ema:0.1" (its first parameter),
    "decay:1-sqrt:floor=0.1".
    """
    axes = [[{name: value} for value in values] or [{}] for name, values in (("last", last), ("every", every), ("at", at))]
    found = [
        combination(method, parameters, {key: value for part in parts for key, value in part.items()})
        for method, parameters in map(parse_method, methods)
        for parts in product(*axes)
    ]
    return unique(found)


def unique(combinations: Sequence[Combination]) -> list[Combination]:
    """The combinations without repeated ones. Raises UsageError when two different ones have the
    same name.
    """
    found: dict[str, Combination] = {}
    for each in combinations:
        if found.setdefault(each.name, each) != each:
            raise UsageError(f"two outputs of the sweep are named {each.name}", hint='give one another "name" in the list')
    return list(found.values())


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """The method and the parameters of "ema:0.1" or "ema:half-life=2000". Raises UsageError."""
    name, *rest = text.strip().split(":")
    method = METHODS.get(name)
    if method is None:
        raise not_a_choice("--method", text, tuple(each.name for each in METHODS.values() if not each.is_explicit), METHOD_SYNONYMS)
    if method.is_explicit:
        raise UsageError(f"--method cannot be {text!r} in a sweep", hint="weights are given in a list:  --list FILE")
    parameters: dict[str, Any] = {}
    for position, part in enumerate(rest):
        key, is_named, value = part.partition("=")
        if not is_named:
            key, value = next(iter(method.parameters), ""), part
        key = key.replace("-", "_")
        if key not in method.parameters or (position and not is_named) or key in parameters:
            raise UsageError(
                f"--method {text}: {name} does not take {part!r} there",
                details=[f"expected  {name}" + "".join(f"[:{each.replace('_', '-')}=...]" for each in method.parameters)],
                hint="the first parameter may go by its value alone: ema:0.1, decay:1-sqrt, power:0.2",
            )
        parameters[key] = method.parameters[key].check(value)
    return name, parameters


EXAMPLE_LIST = '[{"method": "ema", "alpha": 0.1, "last": 6}, {"method": "sma", "last": 10, "at": 8000}]'


def entry(given: object) -> Combination:
    """The combination of an object with options of `pmerge average`, `at` and an optional `name`.
    Raises UsageError.
    """
    if not isinstance(given, dict):
        raise UsageError(f"an entry of the list is {str(given)[:60]}, expected an object", hint=EXAMPLE_LIST)
    options_by_word = {each.flag.removeprefix("--"): name for name, each in (SELECTION | PARAMETERS).items()}
    options = {options_by_word.get(key) or key.replace("-", "_"): value for key, value in given.items()}
    unknown = sorted(options.keys() - {"method", "name"} - SELECTION.keys() - PARAMETERS.keys())
    if unknown:
        raise UsageError(
            f"unknown option {', '.join(map(repr, unknown))} in the list of a sweep",
            details=[f"expected  {', '.join(['name', 'method', *sorted(options_by_word)])}"],
        )
    name, method = options.get("name", ""), options.get("method", implied_method(options, DEFAULT))
    if not isinstance(method, str) or not isinstance(name, str):
        raise UsageError("method and name are words", hint=EXAMPLE_LIST)
    parameters = {key: value for key, value in options.items() if key in PARAMETERS}
    return combination(method, parameters, {key: value for key, value in options.items() if key in SELECTION}, name)


def combination(method: str, parameters: Mapping[str, Any], selection: Mapping[str, Any], name: str = "") -> Combination:
    """A combination whose options are of the right kind and in range. Raises UsageError."""
    parameters = check_parameters(method, parameters)
    if not METHODS[method].is_explicit:
        coefficients(method, [1.0, 2.0], **parameters)
    asked = Selection(**selection)
    selection = {key: getattr(asked, SELECTION[key].field) for key in selection}
    name = name or _name(method, parameters, selection)
    if not _NAME.fullmatch(name) or len(name) > _MOST_NAME_BYTES or name.endswith((STAGING_SUFFIX, ".safetensors")):
        raise UsageError(
            f"{name!r:.80} cannot be the name of an output",
            details=[f"expected  at most {_MOST_NAME_BYTES} letters, digits and _.=+-, the first none of .-"],
            hint='give it a "name" in the list',
        )
    return Combination(name, method, dict(parameters), dict(selection))


def _name(method: str, parameters: Mapping[str, Any], selection: Mapping[str, Any]) -> str:
    """The method, its parameters (the first without its word), then the selection: "ema-0.1-last6"."""
    first = next(iter(METHODS[method].parameters), "") if method in METHODS else ""
    parts = [method]
    for key in sorted(parameters, key=lambda key: (key != first, key)):
        value = parameters[key]
        shown = [f"{each!r}" for each in value] if isinstance(value, list | tuple) else [str(value)]
        parts += [*([] if key == first else [key.replace("_", "-")]), *shown]
    parts += [f"{each.flag.removeprefix('--')}{selection[key]}" for key, each in SELECTION.items() if key in selection]
    return re.sub(r"[^A-Za-z0-9_.=+-]", "_", "-".join(parts))
