"""The request: every option once, with its type, default, choices, help text and flag.

    Selection   which checkpoints, in which order    decides the inputs and their coefficients
    MergeSpec   how they are averaged                decides the bytes of the output, given the inputs
    RunConfig   how the work is carried out          decides no byte
    Processes   which processes share the work       decides no byte

A new option is a field here and the code that uses it: the flags of the commands
(`cli/options.py`), the keywords of Python calls, the record in `pmerge.json`, resuming and `verify
--against-inputs` (`planning/record.py`) follow. The parameters of the methods are options of
MergeSpec, and are in `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from merge_cli.errors import UsageError
from merge_cli.request.amounts import parse_count, parse_size, parse_whole
from merge_cli.request.methods import DEFAULT, METHOD_SYNONYMS, METHODS, PARAMETERS, check_parameters, implied_method
from merge_cli.request.option import Options, option, options_of
from merge_cli.stores.store import StrPath

Made = TypeVar("Made", bound=Options)
MOST_PROCESSES = MOST_THREADS = 256
MAX_HEADERS = 100_000_000
_LONGEST_WAIT_S = 7 * 86_400


def _globs(value: str | Sequence[str], _: str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _amount(value: Any, flag: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(f"{flag} cannot be {value!r}", hint="amounts are numbers, or strings such as 8B")
    return value


def _stride(value: Any, flag: str) -> int | str:
    if isinstance(_amount(value, flag), int) and value < 1:
        raise UsageError(f"{flag} must be at least 1 step, not {value}")
    return value  # type: ignore[no-any-return]


def read_seconds(value: float | str, flag: str) -> float:
    """A length of time in seconds. Raises UsageError for NaN, less than 0, and more than a week."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds <= _LONGEST_WAIT_S:
        raise UsageError(f"{flag} cannot be {value!r}", details=["expected  seconds, at most a week"], hint=f"{flag} 60")
    return seconds


def _workers(value: int | str, flag: str) -> int | str:
    if value == "auto":
        return value
    try:
        return parse_whole(value, flag, 1, MOST_PROCESSES)
    except UsageError as error:
        expected = f"expected  a number from 1 to {MOST_PROCESSES}, or auto"
        raise UsageError(f"{flag} cannot be {value!r}", details=[expected], hint="--workers 2") from error


@dataclass(frozen=True)
class Selection(Options):
    """The checkpoints to average, out of those found. Amounts are steps; with `tokens_per_step`,
    "8B" is tokens.
    """

    order: str = option(
        "step",
        "Order from oldest to newest: by step, given (as typed) or mtime.",
        choices=("step", "given", "mtime"),
    )
    last: int | None = option(None, "Only the newest N.", metavar="N", read=partial(parse_whole, least=1))
    every: int | str | None = option(None, "One every V steps (500, 2k), back from the newest.", metavar="V", read=_stride)
    from_step: int | str | None = option(None, "From this step on.", flag="--from", metavar="STEP", read=_amount)
    to_step: int | str | None = option(None, "Up to and including this step.", flag="--to", metavar="STEP", read=_amount)
    before: int | str | None = option(None, "Before this step (a loss spike).", metavar="STEP", read=_amount)
    at: int | str | None = option(None, "Ending at the checkpoint of this step.", metavar="STEP", read=_amount)
    tokens_per_step: int | None = option(
        None,
        "As 4M: amounts with a suffix (--every 8B) are then tokens; plain numbers stay steps.",
        metavar="N",
        read=parse_count,
    )
    incomplete: str = option(
        "newest",
        "Checkpoints of a run folder that are still being written: leave out the newest, skip all, or error.",
        choices=("newest", "skip", "error"),
    )
    allow_merged: bool = option(False, "Take earlier results of pmerge as checkpoints too.")
    base: StrPath | None = option(
        None, "Checkpoint whose layout and side files are kept.", metavar="PATH", shown="the last in order"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at is not None and (self.to_step is not None or self.before is not None):
            raise UsageError("--at ends a selection, and so do --to and --before", hint="use one of them")

    @property
    def amounts(self) -> dict[str, int | str]:
        """The given amounts of steps or tokens, by flag."""
        found = {each.flag: getattr(self, each.field) for each in options_of(Selection) if each.read in (_amount, _stride)}
        return {flag: amount for flag, amount in found.items() if amount is not None}


@dataclass(frozen=True)
class MergeSpec(Options):
    """Everything that decides the bytes of the output, apart from the inputs and their order."""

    method: str = option(
        DEFAULT,
        "Averaging method; pmerge methods lists them.",
        choices=tuple(METHODS),
        synonyms=METHOD_SYNONYMS,
    )
    parameters: Mapping[str, Any] = field(default_factory=dict)  # options too: those of METHODS
    dtype: str = option(
        "keep",
        "Dtype of the floats in the result.",
        choices=("keep", "bf16", "fp16", "fp32"),
        synonyms={"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"},
    )
    accumulate: str = option(
        "auto",
        "Dtype of the sums; auto is fp32 where that is exact.",
        choices=("auto", "fp32", "fp64"),
        synonyms={"float32": "fp32", "float": "fp32", "float64": "fp64", "double": "fp64"},
    )
    include: tuple[str, ...] = option((), "Average only tensors that match this glob.", metavar="GLOB", read=_globs)
    exclude: tuple[str, ...] = option((), "Copy tensors that match this glob from the base.", metavar="GLOB", read=_globs)
    int_policy: str = option("error", "Integers that differ: an error, or those of the newest.", choices=("error", "newest"))
    allow_nonfinite: bool = option(False, "Go on at NaN and Inf, and report them.")
    shard_bytes: int | None = option(
        None, "Split anew, as 5GB.", name="shard_size", metavar="SIZE", read=parse_size, shown="the base's shards"
    )
    requantize: bool = option(False, "Quantize the result as the base is; otherwise it becomes bf16.")
    training_state: str = option(
        "drop",
        "Distributed checkpoints: weights only; all else from the base; or with averaged moments.",
        choices=("drop", "base", "average"),
    )

    format: str = option(
        "keep",
        "Layout of the result: the base's, or safetensors with whole tensors of a distributed checkpoint.",
        choices=("keep", "safetensors"),
        synonyms={"hf": "safetensors", "dcp": "keep", "base": "keep"},
    )

    @property
    def copies_from_base(self) -> bool:
        """Whether values, or more than headers, may be taken over from the base."""
        return bool(self.include or self.exclude or self.requantize or self.int_policy == "newest" or self.training_state != "drop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "safetensors" and self.training_state != "drop":
            raise UsageError(
                f"--training-state {self.training_state} keeps what only a distributed checkpoint can hold, and --format"
                " safetensors writes weights only",
                hint="leave one of them out",
            )
        object.__setattr__(self, "parameters", check_parameters(self.method, self.parameters))
        if self.requantize and self.dtype != "keep":
            raise UsageError("--requantize keeps the base's dtypes, and --dtype changes them", hint="use one of them")


@dataclass(frozen=True)
class RunConfig(Options):
    """How the work is carried out: none of it changes a byte of the result."""

    device: str = option("auto", "cpu, cuda, cuda:K, or auto: a GPU where it is measured to be faster.", metavar="NAME")
    memory: int = option(2 << 30, "Bound on the buffers.", metavar="SIZE", read=parse_size, shown="2GiB")
    device_memory: int | None = option(
        None, "Bound on a GPU's buffers.", metavar="SIZE", read=parse_size, shown="4GiB, at most 3/4 of what is free"
    )
    threads: int | None = option(
        None,
        "Worker threads.",
        metavar="N",
        read=partial(parse_whole, least=1, most=MOST_THREADS),
        shown="the cores, at least 2; at most 8 where torch does the sums",
    )
    chunk_size: int | None = option(
        None, "Size of one read, as 4MiB.", metavar="SIZE", read=parse_size, shown="chosen by the filesystem"
    )
    direct: str = option("auto", "Read past the page cache (O_DIRECT).", choices=("auto", "on", "off"))
    max_header: int = option(
        MAX_HEADERS, "Bound on the headers of all checkpoints together.", metavar="SIZE", read=parse_size, shown="100MB"
    )
    settle: float = option(
        0.0, "Wait until the inputs have been still for so long.", metavar="SECONDS", read=read_seconds, shown="no wait"
    )
    overwrite: bool = option(False, "Replace an existing result, at the end.")
    restart: bool = option(False, "Discard the files of an unfinished run.")
    verify_resume: bool = option(False, "Read finished files again before trusting them.")
    verify_existing: bool = option(False, "Read an existing result again before trusting it.")
    trust_owner: str | None = option(
        None, "Another user whose files in the staging folder are trusted.", metavar="NAME|UID", shown="only your own"
    )

    def without_trials(self) -> RunConfig:
        """The same for a run that will not read weights: nothing is timed to choose a device."""
        return replace(
            self, device="cpu" if self.device == "auto" else self.device, direct="off" if self.direct == "auto" else self.direct
        )


@dataclass(frozen=True)
class Processes(Options):
    """The processes that share the work, as typed: started here, or by a launcher
    (`ranks/launcher.py`).
    """

    workers: int | str = option(1, "Processes on this machine: a number, or auto.", metavar="N", read=_workers)
    rank: int | None = option(None, "Number of this process among several that make one result.", metavar="R", read=parse_whole)
    world_size: int | None = option(
        None, "How many they are.", metavar="W", read=parse_whole, shown="both from the launcher's variables"
    )


def read_options(
    options: Mapping[str, Any], selection: Selection | None = None, spec: MergeSpec | None = None, run: RunConfig | None = None
) -> tuple[Selection, MergeSpec, RunConfig]:
    """The specs of options by keyword, as of `average(paths, output, **options)`, laid over those
    that are given.

    An option that is None counts as not given. Raises UsageError for a value, TypeError for an
    unknown keyword.
    """
    given = {name: value for name, value in options.items() if value is not None}
    spec = spec or MergeSpec()
    parameters = {name: given.pop(name) for name in PARAMETERS if name in given}
    if parameters and "method" not in given:
        given["method"] = implied_method(parameters, spec.method)
    if given.get("method", spec.method) == spec.method:
        parameters = {**spec.parameters, **parameters}
    selection = lay_over(selection or Selection(), given)
    spec = lay_over(spec, given, parameters=parameters)
    run = lay_over(run or RunConfig(), given)
    if given:
        known = [each.name for made in (selection, spec, run) for each in options_of(type(made))]
        raise TypeError(f"no option {next(iter(given))!r}; there are {', '.join(sorted([*known, *PARAMETERS]))}")
    return selection, spec, run


def lay_over(made: Made, given: dict[str, Any], **more: Any) -> Made:
    """`made` with the options of its own that are in `given`, which are taken out of there."""
    own = {each.field: given.pop(each.name) for each in options_of(type(made)) if each.name in given}
    return replace(made, **own, **more)  # type: ignore[type-var]  # its subclasses are dataclasses
