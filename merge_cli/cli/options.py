"""The flags of the commands, made from the specs of the request, and those that several commands
share.

    @takes(*flags(Selection), *flags(RunConfig))
    def command(checkpoints: Checkpoints, *, given: Given, quiet: Quiet = False) -> None: ...

has a flag for every option of the two specs; `given` maps the options that were typed to their
text.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Annotated, Any

import typer

from merge_cli.request.methods import METHODS, Method, Parameter
from merge_cli.request.option import Option, Options, options_of

Given = dict[str, Any]
Checkpoints = Annotated[list[str], typer.Argument(help="One run folder, or checkpoint folders and .safetensors files.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and its problems; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")]
InputsRoot = Annotated[str | None, typer.Option(metavar="PATH", help="The folder in which the checkpoints lie now, if they moved.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]


def flags(spec: type[Options], *, only: Collection[str] | None = None, skip: Collection[str] = ()) -> list[Option]:
    """The options of a spec, by name: only some, or all but some. Those of the methods follow
    `method`.
    """
    found: list[Option] = []
    for each in options_of(spec):
        if each.name not in skip and (only is None or each.name in only):
            found += [each, *(method_flags(METHODS.values()) if each.name == "method" else [])]
    return found


def method_flags(methods: Iterable[Method]) -> list[Parameter]:
    """The parameters of `methods`, each with the methods that have it in front of its help text."""
    found: dict[str, Parameter] = {}
    for method in methods:
        for name, each in method.parameters.items():
            before = f"{found[name].help}; " if name in found else ""
            found[name] = replace(each, help=f"{before}{method.name}: {each.help}")
    return list(found.values())


def takes(*options: Option) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command has flags for `options`, and gets those typed as `given`, by name."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(command, eval_str=True).parameters.values():
            parameters += map(_parameter, options) if own.name == "given" else [own.replace(kind=own.KEYWORD_ONLY)]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            typed = {each.name: values.pop(each.name) for each in options}
            command(**values, given={name: value for name, value in typed.items() if value not in (None, False, [])})

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _parameter(each: Option) -> inspect.Parameter:
    """The parameter of a function from which typer makes the flag: a switch, a list, or text that
    the spec reads.
    """
    default: bool | None = False if each.is_switch else None
    kind: Any = bool if each.is_switch else list[str] | None if each.is_list else str | None
    described = typer.Option(
        each.flag, metavar=None if each.is_switch else each.metavar or "|".join(each.choices) or None, help=_help(each)
    )
    return inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, described])


def _help(each: Option) -> str:
    default = each.shown or ("" if each.default is None or each.is_switch or each.is_list else str(each.default))
    return f"{each.help} [default: {default}]" if default else each.help
