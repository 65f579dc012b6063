"""The bytes that pmerge writes, frozen: a sha256 of every output file for a matrix of requests, in
`golden.json`.

    scripts/golden           make all rows again, print the rows that change, write golden.json and flags.json
    scripts/golden --check   the same, and write nothing; exit status 1 if a row changes

`pmerge.json` and `sweep.json` go in as the fields that do not depend on the place and the time of a
run. Averages by several ranks and outputs of a sweep have no rows of their own where they must
equal those of a lone average: the test compares them with it.

`one_average`, `by_ranks` and `one_sweep` are the only code here that calls pmerge.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from golden_inputs import RUNS, SCHEMES, write_all
from paths import TESTS

GOLDEN = TESTS / "golden.json"
FLAGS = TESTS / "flags.json"
INPUTS = "inputs"  # the row of the runs themselves: a generator that has changed is told from an output that has

Digests = dict[str, str]  # file name -> sha256

# fields of pmerge.json and sweep.json that are another thing in another place, at another time or
# in another version
_VOLATILE = frozenset({"path", "base", "version", "command", "pmerge", "schema", "versions", "reason"})


class Row(NamedTuple):
    """One request: the `run` of golden_inputs.py that it averages, and the options of `average` or
    `sweep`.
    """

    run: str
    options: Mapping[str, Any]


METHODS: dict[str, dict[str, Any]] = {
    "sma": {},
    "wma": {"method": "wma"},
    "ema": {"method": "ema"},
    "ema-0.7": {"method": "ema", "alpha": 0.7},
    "ema-half-life": {"method": "ema", "half_life": 150.0},
    "decay": {"method": "decay"},
    "decay-linear": {"method": "decay", "shape": "linear"},
    "decay-cosine": {"method": "decay", "shape": "cosine", "floor": 0.1},
    "power": {"method": "power", "sigma_rel": 0.2},
}
PLAIN_RUNS = [name for name in RUNS if name not in SCHEMES]
SWEEP_METHODS = ["sma", "wma", "ema", "ema:0.7", "ema:half-life=150", "decay:1-sqrt", "decay:linear", "power:0.2"]


def _averages() -> Iterator[tuple[str, Row]]:
    for run in PLAIN_RUNS:
        for name, method in METHODS.items():
            yield f"{run}, {name}", Row(run, method)
    for run in ("sharded", "mixed", "dtypes", "experts-mixed", "fp8-then-bf16"):
        for dtype in ("bf16", "fp32") if run == "mixed" else ("bf16", "fp16", "fp32"):
            yield f"{run}, sma to {dtype}", Row(run, {"dtype": dtype})
        for accumulate in ("fp32", "fp64"):
            if (run, accumulate) != ("mixed", "fp32"):
                yield f"{run}, wma in {accumulate}", Row(run, {"method": "wma", "accumulate": accumulate})
    for scheme in SCHEMES:
        for name in ("sma", "ema"):
            yield f"{scheme}, {name}", Row(scheme, METHODS[name])
            yield f"{scheme}, {name}, requantized", Row(scheme, {**METHODS[name], "requantize": True})
    for scheme in ("fp8-block", "int4", "gpt-oss"):
        yield f"{scheme}, sma to fp32", Row(scheme, {"dtype": "fp32"})
    negative, three = [-0.25, 0.25, 0.375, 0.625], [1.0, 2.0, 3.0]
    yield "sharded, weights", Row("sharded", {"method": "weights", "weights": negative})
    yield "sharded, weights, normalized", Row("sharded", {"method": "weights", "weights": three, "normalize": True, "last": 3})
    yield "sharded, order given", Row("sharded", {"method": "ema", "order": "given"})
    yield "sharded, one", Row("sharded", {"last": 1})
    yield "sharded, last 3", Row("sharded", {"last": 3})
    yield "sharded, every 200", Row("sharded", {"method": "ema", "every": 200})
    yield "sharded, 200 to 300", Row("sharded", {"from_step": 200, "to_step": 300})
    yield "sharded, exclude", Row("sharded", {"exclude": ["*norm*", "lm_head.weight"]})
    yield "sharded, include", Row("sharded", {"method": "ema", "include": ["*.q_proj.weight"]})
    yield "sharded, in files of 20 kB", Row("sharded", {"shard_size": 20_000})
    yield "mixed, integers of the newest", Row("mixed", {"int_policy": "newest"})
    yield "mixed, exclude integers", Row("mixed", {"exclude": ["mask", "lookup", "any.*"]})
    yield "mixed, to fp16, which overflows", Row("mixed", {"dtype": "fp16", "allow_nonfinite": True})
    yield "fp8-block, exclude", Row("fp8-block", {"exclude": ["a.*"]})
    yield "fp8-block, exclude, requantized", Row("fp8-block", {"exclude": ["a.*"], "requantize": True})


def _sweeps() -> Iterator[tuple[str, Row]]:
    grid = {"methods": SWEEP_METHODS, "last": [1, 2, 4], "at": [300, 400]}
    for run in ("sharded", "mixed", "experts-mixed", "ranks", "fp8-then-bf16"):
        yield f"sweep of {run}", Row(run, grid)
    yield "sweep of sharded to fp32", Row("sharded", {**grid, "dtype": "fp32"})
    yield "sweep of nvfp4", Row("nvfp4", {"methods": ["sma", "ema:0.7"], "last": [2, 3]})
    weights = [{"name": "weights", "weights": [0.25, 0.75], "last": 2}, {"method": "decay", "floor": 0.25}]
    yield "sweep of single, a list", Row("single", {"combinations": weights})


AVERAGES = dict(_averages())
SWEEPS = dict(_sweeps())
BY_RANKS = [name for name, row in AVERAGES.items() if row.options.get("method") == "ema"]


def one_average(paths: Sequence[Path], out: Path, options: Mapping[str, Any]) -> None:
    """Average by one process."""
    from merge_cli import average

    average(paths, out, device="cpu", **options)


def by_ranks(paths: Sequence[Path], out: Path, options: Mapping[str, Any], world_size: int = 3) -> None:
    """Average by several ranks, the last one first, files cut into pieces of some hundred bytes and
    chunks of some thousand.
    """
    from merge_cli import Rank, plan_average, run_average

    with mock.patch("merge_cli.ranks.shares.MIN_PIECE_BYTES", 512):
        for number in reversed(range(world_size)):
            rank = Rank(number, world_size, source="--rank")
            run_average(plan_average(paths, out, device="cpu", threads=2, chunk_size=8192, rank=rank, **options))


def one_sweep(paths: Sequence[Path], out: Path, options: Mapping[str, Any]) -> None:
    """Sweep by one process."""
    from merge_cli import sweep

    sweep(paths, out, device="cpu", **options)


def flags() -> dict[str, list[str]]:
    """The options of every command, as they are typed, in alphabetical order; arguments by their
    name.
    """
    import typer

    from merge_cli.cli.app import make_app

    command = typer.main.get_command(make_app())
    return {
        name: sorted(word for parameter in each.params for word in (*parameter.opts, *parameter.secondary_opts))
        for name, each in sorted({"pmerge": command, **command.commands}.items())  # type: ignore[attr-defined]
    }


def digests(folder: Path) -> Digests:
    """The sha256 of every file below `folder`, by its path there; of pmerge's own records, of the
    fields that last.
    """
    return {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def digests_of_folders(folder: Path) -> Digests:
    """The sha256 of every file in `folder`, and of every folder in it one over the digests of its
    files.
    """
    return {path.name: _digest(path) for path in sorted(folder.iterdir())}


def _digest(path: Path) -> str:
    if path.is_dir():
        return hashlib.sha256(json.dumps(digests(path), sort_keys=True).encode()).hexdigest()
    data = path.read_bytes()
    if path.name in ("pmerge.json", "sweep.json"):
        content = json.loads(data)
        content.pop("sha256", None)  # the seal over what stands before it
        data = json.dumps(_lasting(content), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if key not in _VOLATILE}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def all_rows(folder: Path) -> dict[str, Digests]:
    """Make every row in `folder`."""
    runs = write_all(folder / "runs")
    rows = {INPUTS: digests_of_folders(folder / "runs")}
    for number, (name, row) in enumerate(AVERAGES.items()):
        one_average(runs[row.run], folder / f"average-{number}", row.options)
        rows[name] = digests(folder / f"average-{number}")
    for number, (name, row) in enumerate(SWEEPS.items()):
        one_sweep(runs[row.run], folder / f"sweep-{number}", row.options)
        rows[name] = digests_of_folders(folder / f"sweep-{number}")
    return rows


def changed(before: Mapping[str, Digests], after: Mapping[str, Digests]) -> list[str]:
    """A line for each row that differs, with the files in which it does."""
    lines = []
    for name in [*before, *(name for name in after if name not in before)]:
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            lines.append(f"{'new ' if was is None else 'gone'}  {name}")
        elif was != now:
            files = [file for file in sorted(was.keys() | now.keys()) if was.get(file) != now.get(file)]
            lines.append(f"other {name}: {', '.join(files)}")
    return lines


def main() -> int:
    """Make all rows again and print what changes; the exit status."""
    only_check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not only_check:
        print(__doc__)
        return 2
    before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        after = all_rows(Path(folder))
    known = json.loads(FLAGS.read_text()) if FLAGS.exists() else {}
    lines = [*changed(before, after), *(f"flags {name}" for name, now in flags().items() if known.get(name) != now)]
    lines += [f"flags {name}" for name in known.keys() - flags().keys()]
    print("\n".join(lines) or f"all {len(after)} rows are as before")
    if not only_check:
        GOLDEN.write_text(json.dumps(after, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        FLAGS.write_text(json.dumps(flags(), indent=1) + "\n")
    return 1 if only_check and lines else 0


if __name__ == "__main__":
    sys.exit(main())
